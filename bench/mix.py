"""Measures mixed work on one GPU: two models taking turns, and a short prompt among long answers.

    python -m bench.mix [--shape 1B] [--rows 128] [--folder /tmp/checkpoints]

Prints the throughput of two models with half of the rows each beside that of one with all of them (target: at most 5 % less), and the time to the first
token of a short prompt while 64 rows decode, in steps (target: at most 3). Random weights, greedy, EOS ignored, one engine, after a warm-up.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from bench.checkpoints import SHAPES, Shape, write
from bench.packed import checkpoint_of
from tests.support.engine_process import Engine, Prompts, Timeline, engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1B")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--late-s", type=float, default=0.3)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    config = {"device": args.device, "max_rows": 512, "host_budget_bytes": 16 << 30}
    # before the engine takes the device's memory: random weights are drawn there
    folders = [write(shape, args.folder / f"{args.shape}-{number}", seed=number) for number in range(2)]
    checkpoints = [checkpoint_of(folder, args.format, args.folder) for folder in folders]
    with engine(config) as running:
        for name, checkpoint in zip(("one", "two"), checkpoints, strict=True):
            running.load(name, checkpoint)
        turns(running, shape, args.rows, args.output, args.repeats)
        first_token(running, shape, args.repeats, args.late_s)


def turns(running: Engine, shape: Shape, rows: int, output_tokens: int, repeats: int) -> None:
    """Compare one model with all rows and two models with half of the rows each."""
    rates = {}
    for names in (("one",), ("one", "two")):
        runs: list[Timeline] = []
        for _ in range(repeats + 1):
            runs.append(running.generate(_prompts(shape, names, rows, 256, len(runs)), output_tokens))
            running.wait_idle(1.0)
        rates[names] = statistics.median(run.tokens_per_s for run in runs[1:])
    alone, shared = rates[("one",)], rates["one", "two"]
    print(
        f"{rows} rows: one model {alone:.0f} tok/s, two taking turns {shared:.0f} tok/s, {1 - shared / alone:.1%} less (target: at most 5 %)",
        flush=True,
    )


def first_token(running: Engine, shape: Shape, repeats: int, late_s: float) -> None:
    """Measure the first token of a prompt of 32 ids that arrives while 64 rows decode."""
    waits, steps = [], []
    for repeat in range(repeats + 1):
        result = running.generate(
            _prompts(shape, ("one",), 64, 256, repeat),
            256,
            late=(late_s, _prompts(shape, ("one",), 1, 32, 99 + repeat)),
        )
        running.wait_idle(0.5)
        if repeat:
            waits.append(statistics.median(result.late_first_s))
            steps.append(statistics.median(result.gaps_s))
    wait, step = statistics.median(waits), statistics.median(steps)
    print(
        f"a short prompt among 64 rows: first token after {wait * 1e3:.1f} ms, a step takes {step * 1e3:.2f} ms: {wait / step:.1f} steps (target: 3)"
    )


def _prompts(shape: Shape, names: tuple[str, ...], rows: int, length: int, seed: int) -> Prompts:
    rng = np.random.default_rng(seed * 1009 + rows)
    return [(names[row % len(names)], rng.integers(100, shape.vocab, length, dtype=np.int32)) for row in range(rows)]


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
