"""Measures LoRA adapters on one GPU: output tokens per second with a base alone and with rows spread over 1, 8 and 32 adapters, beside vLLM's.

    python -m bench.lora [--lines 8B/bf16,8B/nf4] [--rank 16] [--cases 1/0,1/1,32/0,…] [--folder /tmp/repertory-checkpoints]
    python -m bench.lora --cases none --residency          first tokens of 200 adapters of which 64 are on the device (bench/lora_residency.py)
    python -m bench.lora --device cpu --lines tiny/bf16 --cases 1/0,1/1,8/2 --budget-gib 0.5 --host-gib 0.5          that it runs, on any machine

N requests with random token ids are submitted at once, greedy, EOS ignored, row i asks for adapter i modulo their number; the figure is the median
of --repeats runs after one warm-up. Weights and adapters (of all seven linear layers) are random. A case is rows/adapters; 0 adapters is the base.
`floor` is the share of the least time of an H200 (bench/limits.py). The exit status is not 0 if a request fails or --residency misses its target.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import limits
from bench.checkpoints import SHAPES, Shape
from bench.engine import prepared
from bench.lora_residency import Traffic, measure_residency
from bench.random_adapters import num_parameters, write_adapters
from runtime.types import Checkpoint
from tests.support.engine_process import Engine, Timeline, engine

INPUT_TOKENS, OUTPUT_TOKENS = 256, 128
CASES = "1/0,1/1,32/0,32/1,32/8,32/32,256/0,256/1,256/32"
# vLLM 0.22.1 on the same machine with --enable-lora --max-lora-rank 16 --max-loras 32, Llama 8B in bf16, and the targets: output tokens per second
VLLM = {"1/1": 139, "32/1": 3266, "32/8": 2586, "32/32": 1494, "256/1": 7438, "256/32": 5607}
ASKED = {"1/1": 220, "32/1": 4900, "32/8": 4600, "32/32": 4200, "256/1": 11000, "256/32": 10400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default="8B/bf16")
    parser.add_argument("--cases", default=CASES, help="comma separated rows/adapters; none = no table")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-gib", type=float, default=0.0)
    parser.add_argument("--host-gib", type=float, default=0.0, help="0 = 24, or 48 with --residency")
    parser.add_argument("--residency", action="store_true", help="measure first tokens when adapters must come in")
    traffic = Traffic()
    parser.add_argument("--registered", type=int, default=traffic.registered, help="adapters of --residency")
    parser.add_argument("--resident", type=int, default=traffic.resident, help="of them on the device at once")
    parser.add_argument("--rate", type=float, default=traffic.rate, help="requests a second of --residency")
    parser.add_argument("--seconds", type=float, default=traffic.seconds, help="of each of the two runs of --residency")
    parser.add_argument("--exponent", type=float, default=traffic.exponent, help="of the power law of --residency")
    args = parser.parse_args()
    wanted = [] if args.cases == "none" else args.cases.split(",")
    cases = [(int(rows), int(count)) for rows, count in (case.split("/") for case in wanted)]
    traffic = Traffic(args.registered, args.resident, args.rate, args.seconds, args.exponent)
    config = {
        "device": args.device,
        "max_rows": 512,
        "max_adapters": args.resident,
        "device_budget_bytes": int(args.budget_gib * 2**30),
        "host_budget_bytes": int((args.host_gib or (48 if args.residency else 24)) * 2**30),
    }
    most = max([count for _, count in cases] + [args.registered if args.residency else 0])
    if max((count for _, count in cases), default=0) > args.resident:
        parser.error(f"a case has more adapters than --resident {args.resident}")
    lines = args.lines.split(",")
    paths = {line: prepared(line, args.folder) for line in lines}
    started = time.perf_counter()
    shapes = {SHAPES[line.split("/")[0]] for line in lines}
    adapters = {shape.name: write_adapters(shape, args.rank, most, args.folder) for shape in shapes}
    print(f"{most} adapters of rank {args.rank} written or found in {time.perf_counter() - started:.1f} s", flush=True)
    is_met = True
    with engine(config, log=args.log) as running:
        print(f"{running.hello.device_name}: {running.hello.device_budget_bytes / 2**30:.0f} GiB for models")
        for line in lines:
            shape = SHAPES[line.split("/")[0]]
            names = load_line(running, line, paths[line], adapters[shape.name])
            if cases:
                print_table(running, line, shape, names, cases, args.rank, args.repeats)
            if args.residency:
                is_met &= measure_residency(running, shape, names, traffic)
            for name in (*names, line):
                running.unload(name)
    if not is_met:
        sys.exit("first tokens of adapters that had to come in were later than asked")


def load_line(running: Engine, line: str, path: Checkpoint, adapters: Sequence[Checkpoint]) -> list[str]:
    """Load a base and its adapters, and return the adapters' names."""
    loaded, took = running.load(line, path)
    print(f"\n{line}: loaded in {took:.2f} s; {loaded.facts.path}")
    names = [f"{line}/adapter-{number}" for number in range(len(adapters))]
    loads_s = [
        running.load(name, checkpoint, adapter_of=line)[1] for name, checkpoint in zip(names, adapters, strict=True)
    ]
    if loads_s:
        print(
            f"{len(names)} adapters: loaded in {loads_s[0] * 1e3:.0f} ms the first, {statistics.median(loads_s) * 1e3:.0f} ms the median"
        )
    return names


def print_table(
    running: Engine,
    line: str,
    shape: Shape,
    names: Sequence[str],
    cases: Sequence[tuple[int, int]],
    rank: int,
    repeats: int,
) -> None:
    print(
        f"{'N':>4} {'adapters':>8} {'tok/s':>8} {'vLLM':>8} {'x':>5} {'asked':>8} {'met':>4} {'of base':>8} {'floor':>6} {'TTFT p50':>9} "
        f"{'gap p50':>8} {'gap p99':>8}"
    )
    alone: dict[int, float] = {}
    for rows, count in cases:
        middle, rate = measure(running, shape, list(names[:count]) or [line], rows, count, repeats)
        if not count:
            alone[rows] = rate
        print_row(line, shape, (rows, count), rank, middle, rate, alone.get(rows))


def measure(
    running: Engine, shape: Shape, names: Sequence[str], rows: int, count: int, repeats: int
) -> tuple[Timeline, float]:
    """Return the run of median speed, and its output tokens per second. Raises RuntimeError if a run brings too few tokens."""
    rng = np.random.default_rng(rows * 7919 + count)

    def prompts() -> "list[tuple[str, np.ndarray[Any, np.dtype[np.int32]]]]":
        return [
            (names[row % len(names)], rng.integers(100, shape.vocab, INPUT_TOKENS, dtype=np.int32))
            for row in range(rows)
        ]

    running.generate(prompts(), OUTPUT_TOKENS)
    running.wait_idle(1.0)
    runs = []
    for _ in range(repeats):
        runs.append(running.generate(prompts(), OUTPUT_TOKENS))
        if runs[-1].tokens != rows * OUTPUT_TOKENS:
            raise RuntimeError(f"{rows}/{count}: {runs[-1].tokens} tokens came, {rows * OUTPUT_TOKENS} were asked for")
        time.sleep(0.05)
    rate = statistics.median(run.tokens_per_s for run in runs)
    return min(runs, key=lambda run: abs(run.tokens_per_s - rate)), rate


def floor_s(shape: Shape, format_: str, rows: int, count: int, rank: int) -> float:
    """Return the least time of a case: the base's, each adapter's bytes once a step, and the adapters' arithmetic for the prompts."""
    values = num_parameters(shape, rank)
    seconds = limits.workload_s(shape, format_, rows, INPUT_TOKENS, OUTPUT_TOKENS)
    if count:
        seconds += (OUTPUT_TOKENS - 1) * min(rows, count) * 2.0 * values / limits.COPY_BYTES_PER_S
        seconds += 2.0 * rows * INPUT_TOKENS * values / limits.BF16_FLOP_PER_S
    return seconds


def print_row(
    line: str, shape: Shape, case: tuple[int, int], rank: int, middle: Timeline, rate: float, alone: float | None
) -> None:
    """Print one line of the table. `alone`: tokens per second of the base with as many rows."""
    rows, count = case
    format_ = line.split("/")[1]
    is_published = line == "8B/bf16" and rank == 16
    peer, asked = (table.get(f"{rows}/{count}") if is_published else None for table in (VLLM, ASKED))
    floor = rows * OUTPUT_TOKENS / floor_s(shape, format_, rows, count, rank)
    gaps = sorted(middle.gaps_s) or [float("nan")]
    print(
        f"{rows:>4} {count or 'base':>8} {rate:>8.0f} {peer or '':>8} {f'{rate / peer:.2f}' if peer else '':>5} {asked or '':>8} "
        f"{('yes' if rate >= asked else 'no') if asked else '':>4} {f'{rate / alone:.0%}' if alone and count else '':>8} "
        f"{rate / floor:>6.0%} {statistics.median(middle.first_s.values()) * 1e3:>7.1f}ms {gaps[len(gaps) // 2] * 1e3:>6.2f}ms "
        f"{gaps[int(len(gaps) * 0.99)] * 1e3:>6.2f}ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
