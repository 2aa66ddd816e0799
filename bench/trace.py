"""Replays traces of many models on one GPU: in seconds on a simulated H200 with the engine's own code, or in real time with an engine process.

    python -m bench.trace [--lines 0.9/4/2,1.3/4/4] [--seconds 180]
    python -m bench.trace --device cuda [--lines …] [--seconds 75] [--host-gib 90] [--folder /tmp/repertory-checkpoints]

A line is alpha/CV/rate. 32 models (8B and 1B shapes, bf16 and NF4 in turns) share a device budget for about six of them and a host budget for about
twenty. Popularity is rank^-alpha, arrivals are Gamma distributed with this coefficient of variation, `rate` a second, lengths are log-normal like
the Azure conversation trace, cut to 2,048 and 256 tokens.

Printed per line: goodput (requests with the first token within 1 s or 3 s and at most 100 ms per further token), time to the first token by the tier
of the weights at arrival, the longest waits by model, the link's use, and byte hit rates beside Belady's, which knows the future, and those of a policy that knows
how often each model will be called. Beside the engine:
the simulated engine without overlap of copies and steps, and a model of one vLLM that sleeps and wakes (1.15 s for 8B bf16, 0.82 s for NF4, 0.72 s
for 1B). With `--device`, the simulated engine serves the same lines after the real one, in the same order, so that the simulation can be judged.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from bench.simulated_device import SimulatedModel
from bench.trace_bounds import belady_hit_rate, known_counts_hit_rate
from bench.trace_device import Budgets, choose_budgets, device_engine, write_checkpoints
from bench.trace_outcome import (
    FIRST_TOKENS_HEADER,
    MEMORY_HEADER,
    Outcome,
    first_tokens_row,
    longest_waits,
    memory_row,
)
from bench.trace_simulated import SimulatedEngine, serve_as_vllm
from bench.trace_workload import KINDS, TraceLine, make_models, make_trace, make_warm_up, parse_lines
from common.model_state import Tier
from common.units import GIB

_LINES = "0.5/1/2,0.5/4/2,0.9/4/2,1.3/1/4,1.3/4/4"
_HOST_GIB = 130.0
_ENGINE, _SIMULATED, _NO_OVERLAP, _VLLM = "engine", "engine, simulated", "the same, no overlap", "one vLLM that sleeps"

Results = dict[TraceLine, dict[str, Outcome]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default=_LINES, help="alpha/CV/requests per second, comma separated")
    parser.add_argument("--seconds", type=float, default=180.0, help="length of each trace")
    parser.add_argument("--models", type=int, default=32)
    parser.add_argument("--kinds", default=",".join(KINDS), help="shape/format of the models in turns, comma separated")
    parser.add_argument("--device-gib", type=float, default=60.0)
    parser.add_argument(
        "--host-gib", type=float, default=0.0, help="0 = 130; with --device at most what is free less 30"
    )
    parser.add_argument("--device", default="", help="cuda or cpu: drive an engine process; empty = simulate only")
    parser.add_argument("--warm-gap-s", type=float, default=0.75, help="seconds per model in the warm-up")
    parser.add_argument("--length-share", type=float, default=1.0, help="of the tokens in and out, for a slow device")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    args = parser.parse_args()
    started_s = time.perf_counter()
    models, lines = make_models(args.models, args.kinds.split(",")), parse_lines(args.lines)
    traces = {
        line: make_trace(list(models), args.seconds, line.rate, line.alpha, line.cv, length_share=args.length_share)
        for line in lines
    }
    results: Results = {line: {} for line in lines}
    if args.device:
        checkpoints = write_checkpoints(models, args.folder, args.device)
        _note(started_s, f"{len({model.kind for model in models.values()})} checkpoints written")
        budgets = choose_budgets(args.device, args.device_gib, args.host_gib)
        _describe(models, budgets)
        with device_engine(models, checkpoints, budgets, args.device) as real:
            _note(started_s, f"{len(models)} models loaded: {_tiers(real.tiers)}")
            real.serve(make_warm_up(list(models), args.warm_gap_s))
            _note(started_s, f"warm-up served: {_tiers(real.tiers)}")
            for line in lines:
                results[line][_ENGINE] = real.serve(traces[line])
                _note(started_s, f"line {line.name} served")
        simulated = SimulatedEngine(models, budgets.device_bytes, budgets.host_bytes, slab_bytes=budgets.slab_bytes)
        simulated.serve(make_warm_up(list(models), args.warm_gap_s))
        for line in lines:
            results[line][_SIMULATED] = simulated.serve(traces[line])
        _note(started_s, "lines simulated")
    else:
        budgets = Budgets(int(args.device_gib * GIB), int((args.host_gib or _HOST_GIB) * GIB), 0)
        _describe(models, budgets)
        for line in lines:
            for name, overlap in ((_SIMULATED, True), (_NO_OVERLAP, False)):
                fresh = SimulatedEngine(models, budgets.device_bytes, budgets.host_bytes, overlap=overlap)
                fresh.serve(make_warm_up(list(models), args.warm_gap_s))
                results[line][name] = fresh.serve(traces[line])
    for line in lines:
        results[line][_VLLM] = serve_as_vllm(models, traces[line])
    _report(models, results, budgets)


def _report(models: Mapping[str, SimulatedModel], results: Results, budgets: Budgets) -> None:
    print(FIRST_TOKENS_HEADER)
    for line, by_policy in results.items():
        for policy, outcome in by_policy.items():
            print(first_tokens_row(line.name, policy, outcome))
    print("\n" + MEMORY_HEADER)
    for line, by_policy in results.items():
        for policy, outcome in by_policy.items():
            if policy != _VLLM:
                trace = [one.request for one in outcome.served]
                bounds = [
                    bound(models, trace, budgets.device_bytes, outcome.resident_at_start)
                    for bound in (belady_hit_rate, known_counts_hit_rate)
                ]
                print(memory_row(line.name, policy, models, outcome, *bounds))
    print()
    for line, by_policy in results.items():
        policy, outcome = next(iter(by_policy.items()))
        print(f"{line.name}, {policy}: {longest_waits(models, outcome)}")


def _describe(models: Mapping[str, SimulatedModel], budgets: Budgets) -> None:
    sizes = [model.weight_bytes for model in models.values()]
    mean = sum(sizes) / len(sizes)
    print(
        f"{len(models)} models of {sum(sizes) / GIB:.3g} GiB together; the device budget of {budgets.device_bytes / GIB:.3g} GiB holds about "
        f"{budgets.device_bytes / mean:.0f} of them, the host budget of {budgets.host_bytes / GIB:.3g} GiB about {budgets.host_bytes / mean:.0f}",
        flush=True,
    )


def _tiers(counts: Mapping[Tier, int]) -> str:
    return ", ".join(f"{count} in tier {tier.value}" for tier, count in counts.items())


def _note(started_s: float, text: str) -> None:
    print(f"{time.perf_counter() - started_s:.0f} s: {text}", flush=True)


if __name__ == "__main__":
    main()
