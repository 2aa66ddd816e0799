"""Replays a trace of many models on one simulated H200 in seconds, with the engine's own scheduling and residency code.

    python -m bench.trace [--alpha 0.9] [--cv 4] [--rates 1,2,4,8] [--seconds 600]

32 models (8B and 1B shapes, bf16 and NF4 in turns) share a device budget for about six of them and a host budget for about twenty. Popularity is a
power law, arrivals are Gamma distributed, lengths are log-normal like the Azure conversation trace, cut to 2,048 and 256 tokens. Beside the engine:
the same without overlap of copies and steps, and a model of one vLLM that sleeps and wakes (1.15 s for 8B bf16, 0.82 s for NF4, 0.72 s for 1B).
Printed per line: time to first token by the tier of the weights at arrival, goodput (requests with the first token within 3 s and at most 100 ms per
further token), the link's use, and the byte hit rate beside that of Belady's algorithm, which knows the future.
"""

import argparse
import queue
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.checkpoints import SHAPES
from bench.limits import HOST_TO_DEVICE_BYTES_PER_S
from bench.simulated_device import SLAB_BYTES, SimulatedDevice, SimulatedModel, VirtualClock
from common.units import GIB
from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.ipc.messages import Add, Command, Event, Load, Loaded, Tokens
from runtime.types import Checkpoint, GenerationRequest, SamplingParams, StopParams

FIRST_TOKEN_S, TOKEN_S = 3.0, 0.1
_POLL_S = 0.005
_VLLM_SWITCH_S = {"8B/bf16": 1.15, "8B/nf4": 0.82, "1B/bf16": 0.72, "1B/nf4": 0.72}
_KINDS = ("8B/bf16", "1B/bf16", "8B/nf4", "1B/nf4")


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    model_id: str
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Served:
    """A request's outcome. `tier` is where the weights were when it came."""

    request: Request
    tier: str = "disk"
    first_s: float = float("inf")
    end_s: float = float("inf")

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.at_s

    @property
    def is_good(self) -> bool:
        further = max(1, self.request.output_tokens - 1)
        return self.ttft_s <= FIRST_TOKEN_S and (self.end_s - self.first_s) / further <= TOKEN_S


@dataclass(slots=True)
class Outcome:
    served: list[Served]
    copied_bytes: int
    span_s: float
    hits: list[bool] = field(default_factory=list)
    resident_at_start: frozenset[str] = frozenset()


def make_models(count: int) -> dict[str, SimulatedModel]:
    found = {}
    for index in range(count):
        shape, format_ = _KINDS[index % len(_KINDS)].split("/")
        found[f"m{index:02}"] = SimulatedModel(SHAPES[shape], format_)
    return found


def make_trace(
    models: Sequence[str], seconds: float, rate: float, alpha: float, cv: float, seed: int = 0
) -> list[Request]:
    """Requests over `seconds` at `rate` a second: popularity rank^-alpha in a shuffled order, Gamma arrivals with this coefficient of variation."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, len(models) + 1, dtype=float) ** -alpha
    order = rng.permutation(len(models))
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, int(seconds * rate * 2) + 100)
    arrivals = np.cumsum(gaps)
    arrivals = arrivals[arrivals < seconds]
    chosen = rng.choice(len(models), len(arrivals), p=weights / weights.sum())
    prompts = np.clip(rng.lognormal(np.log(1020), 0.6, len(arrivals)), 1, 2048).astype(int)
    outputs = np.clip(rng.lognormal(np.log(129), 1.0, len(arrivals)), 1, 256).astype(int)
    return [
        Request(float(at), models[order[which]], int(p), int(o))
        for at, which, p, o in zip(arrivals, chosen, prompts, outputs, strict=True)
    ]


def run_engine(
    models: dict[str, SimulatedModel], trace: Sequence[Request], device_bytes: int, host_bytes: int, *, overlap: bool
) -> Outcome:
    """Serve the trace with the engine loop in virtual time."""
    clock = VirtualClock()
    device = SimulatedDevice(models, clock, device_bytes, host_bytes, overlap=overlap)
    config = EngineConfig(device="cpu", device_budget_bytes=device_bytes, slab_bytes=SLAB_BYTES)
    inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
    events: list[Event] = []
    loop = EngineLoop(config, device, inbox, events.append, lambda model_id: None, clock)
    for model_id, model in models.items():
        inbox.put(Load(model_id, Checkpoint(model_id, weight_bytes=model.weight_bytes)))
    while len(loop.table.models) < len(models):
        loop.turn()
        clock.advance(clock.now_s + _POLL_S)
    assert sum(isinstance(event, Loaded) for event in events) == len(models)
    events.clear()
    resident = frozenset(model_id for model_id, model in loop.table.models.items() if model.resident)
    started_s, copied_before = clock.now_s, device.copied_bytes
    served = [Served(request) for request in trace]
    hits: list[bool] = []
    rng = np.random.default_rng(1)
    waiting, next_at = 0, 0
    while next_at < len(trace) or waiting:
        while next_at < len(trace) and started_s + trace[next_at].at_s <= clock.now_s:
            request = trace[next_at]
            loaded = loop.table.models[request.model_id]
            hits.append(loaded.resident)
            served[next_at].tier = "device" if loaded.resident else loaded.lower_tier.value
            inbox.put(Add(next_at, request.model_id, _request(request, rng)))
            next_at += 1
            waiting += 1
        worked = loop.turn()
        for event in events:
            for row in event.rows if isinstance(event, Tokens) else ():
                one = served[row.request_id]
                now = clock.now_s - started_s
                if row.tokens:
                    one.first_s = min(one.first_s, now)
                if row.finish is not None:
                    assert row.error is None, row.error
                    one.end_s = now
                    waiting -= 1
        events.clear()
        if not worked:
            arrival_s = started_s + trace[next_at].at_s if next_at < len(trace) else float("inf")
            busy = clock.now_s + _POLL_S if waiting else float("inf")
            clock.advance(min(arrival_s, clock.next_due_s(), busy))
    return Outcome(served, device.copied_bytes - copied_before, clock.now_s - started_s, hits, resident)


def _request(request: Request, rng: np.random.Generator) -> GenerationRequest:
    prompt = tuple(rng.integers(100, 30_000, request.prompt_tokens).tolist())
    return GenerationRequest(
        prompt=prompt, sampling=SamplingParams(temperature=0.0), stop=StopParams(request.output_tokens, ignore_eos=True)
    )


def run_vllm(models: dict[str, SimulatedModel], trace: Sequence[Request]) -> Outcome:
    """Serve the trace as one vLLM would that sleeps and wakes: one model at a time, until no request of it is left; then the longest waiting one."""
    served = [Served(request) for request in trace]
    waiting: list[Served] = []
    now, next_at, awake = 0.0, 0, ""
    while next_at < len(trace) or waiting:
        while next_at < len(trace) and trace[next_at].at_s <= now:
            waiting.append(served[next_at])
            next_at += 1
        if not waiting:
            now = trace[next_at].at_s
            continue
        model_id = min(waiting, key=lambda one: one.request.at_s).request.model_id
        model = models[model_id]
        if model_id != awake:
            now += _VLLM_SWITCH_S[f"{model.shape.name}/{model.format}"]
            awake = model_id
        rows: dict[int, tuple[Served, int]] = {}
        while True:  # until the model has no request
            while next_at < len(trace) and trace[next_at].at_s <= now:
                waiting.append(served[next_at])
                next_at += 1
            joined = [one for one in waiting if one.request.model_id == model_id]
            waiting = [one for one in waiting if one.request.model_id != model_id]
            rows |= {id(one): (one, 0) for one in joined}
            if not rows:
                break
            prompts = sum(one.request.prompt_tokens for one in joined)
            context = sum(one.request.prompt_tokens + done for one, done in rows.values())
            now += model.step_s(prompts + len(rows) - len(joined), context)
            for key, (one, done) in list(rows.items()):
                one.tier = "host"
                one.first_s = min(one.first_s, now)
                if done + 1 >= one.request.output_tokens:
                    one.end_s = now
                    del rows[key]
                else:
                    rows[key] = (one, done + 1)
    return Outcome(served, 0, now)


def belady_hit_rate(
    models: dict[str, SimulatedModel],
    trace: Sequence[Request],
    capacity_bytes: int,
    resident_at_start: frozenset[str] = frozenset(),
) -> float:
    """Return the share of requested bytes that are resident if the model whose next use is furthest goes first.

    For models of different sizes this is close to the best, not the best.
    """
    uses: dict[str, list[int]] = {}
    for index in range(len(trace) - 1, -1, -1):
        uses.setdefault(trace[index].model_id, []).append(index)
    resident = set(resident_at_start)
    hit = total = 0
    for request in trace:
        uses[request.model_id].pop()
        size = models[request.model_id].weight_bytes
        total += size
        if request.model_id in resident:
            hit += size
            continue
        resident.add(request.model_id)
        while sum(models[name].weight_bytes for name in resident) > capacity_bytes:
            others = resident - {request.model_id}
            resident.discard(max(others, key=lambda name: uses[name][-1] if uses.get(name) else len(trace)))
    return hit / total


def byte_hit_rate(models: dict[str, SimulatedModel], outcome: Outcome) -> float:
    sizes = [models[one.request.model_id].weight_bytes for one in outcome.served]
    return sum(size for size, hit in zip(sizes, outcome.hits, strict=True) if hit) / sum(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=32)
    parser.add_argument("--alpha", type=float, default=0.9)
    parser.add_argument("--cv", type=float, default=4.0)
    parser.add_argument("--rates", default="1,2,4,8", help="requests per second, comma separated")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--device-gib", type=float, default=60.0)
    parser.add_argument("--host-gib", type=float, default=130.0)
    args = parser.parse_args()
    models = make_models(args.models)
    budgets = (int(args.device_gib * GIB), int(args.host_gib * GIB))
    print(
        f"{len(models)} models of {sum(m.weight_bytes for m in models.values()) / GIB:.0f} GiB, device {args.device_gib:g} GiB, host {args.host_gib:g} "
        f"GiB, alpha {args.alpha:g}, CV {args.cv:g}, {args.seconds:g} s"
    )
    print(
        "| rate | policy | goodput/s | TTFT p50 / p95 / p99 | by tier: device / host / disk (p95) | link | byte hits | Belady | longest |"
    )
    print("| --: | --- | --: | --: | --: | --: | --: | --: | --: |")
    for rate in (float(part) for part in args.rates.split(",")):
        trace = make_trace(list(models), args.seconds, rate, args.alpha, args.cv)
        for name, outcome in (
            ("engine", run_engine(models, trace, *budgets, overlap=True)),
            ("engine, no overlap", run_engine(models, trace, *budgets, overlap=False)),
            ("one vLLM that sleeps", run_vllm(models, trace)),
        ):
            best = belady_hit_rate(models, trace, budgets[0], outcome.resident_at_start)
            print(_line(models, rate, name, outcome, best), flush=True)


def _line(models: dict[str, SimulatedModel], rate: float, name: str, outcome: Outcome, best: float) -> str:
    ttfts = sorted(one.ttft_s for one in outcome.served)
    tiers = []
    for tier in ("device", "host", "disk"):
        own = [one.ttft_s for one in outcome.served if one.tier == tier]
        tiers.append(f"{_percentile(own, 95):.2f}" if own else "-")
    link = outcome.copied_bytes / outcome.span_s / HOST_TO_DEVICE_BYTES_PER_S
    hits = f"{byte_hit_rate(models, outcome):.0%}" if outcome.hits else "-"
    good = sum(one.is_good for one in outcome.served) / outcome.span_s
    quantiles = " / ".join(f"{_percentile(ttfts, q):.2f}" for q in (50, 95, 99))
    return f"| {rate:g} | {name} | {good:.2f} | {quantiles} s | {' / '.join(tiers)} s | {link:.0%} | {hits} | {best:.0%} | {ttfts[-1]:.1f} s |"


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


if __name__ == "__main__":
    main()
