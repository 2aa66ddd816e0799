"""Compares N OpenAI streams through mesh, runtime and engine with the engine alone on the same workload.

    python -m bench.served [--shape 8B] [--format bf16] [--streams 256] [--input 16] [--output 512] [--device cuda]

First the engine process by itself, then, when it has ended, `repertory serve` with the same random checkpoint and as many streams from several
client processes; the median of --repeats each, after a warm-up. "step" is the gap between tokens that the engine alone has. A process can use at
most 1000 ms of CPU for 1000 ms, so `CPU ms per 1000 tokens` times the thousands of tokens per second says how full its core is.
"""

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import load
from bench.checkpoints import SHAPES, Shape, write
from bench.packed import checkpoint_of
from bench.processes import CpuSeconds, cpu_seconds
from tests.support import stack
from tests.support.engine_process import engine

NAME = "served"


@dataclass(frozen=True, slots=True)
class Figures:
    """One way's median run. `cpu_ms` is per 1000 tokens, by process."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    tokens_per_event: float
    cpu_ms: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--format", choices=("bf16", "fp32", "int8", "fp8", "nf4", "fp4"), default="bf16")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--input", type=int, default=16)
    parser.add_argument("--output", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--memory", default="", help="device memory for models, such as 60GiB; empty = chosen from the machine"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--clients", type=int, default=6, help="client processes")
    parser.add_argument("--idle", type=float, default=2.0, help="seconds between warm-up and measurement")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--log", type=Path, default=None, help="file for the servers' output")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    folder = _write(shape, args.folder / shape.name)
    alone = _alone(args, shape, folder)
    served = _served(args, shape, folder)
    print(
        f"\n{args.shape} {args.format}, {args.streams} streams, {args.input} tokens in, {args.output} out, median of {args.repeats}\n"
    )
    print(
        "| | tokens/s | share | TTFT p50 | TTFT p99 | gap p50 | gap p99 | in steps | tokens an event | CPU ms per 1000 tokens |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |")
    for title, figures in (("engine alone", alone), ("served", served)):
        cpu = ", ".join(f"{part} {value:.1f}" for part, value in figures.cpu_ms.items())
        print(
            f"| {title} | {figures.tokens_per_s:,.0f} | {figures.tokens_per_s / alone.tokens_per_s:.1%} "
            f"| {figures.ttft_p50_s * 1e3:.0f} ms | {figures.ttft_p99_s * 1e3:.0f} ms "
            f"| {figures.gap_p50_s * 1e3:.1f} ms | {figures.gap_p99_s * 1e3:.1f} ms | {figures.gap_p99_s / alone.gap_p50_s:.2f} "
            f"| {figures.tokens_per_event:.2f} | {cpu} |"
        )


def _write(shape: Shape, folder: Path) -> Path:
    """Write the checkpoint in another process, so that its GPU memory is released."""
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(shape, folder))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise RuntimeError(f"writing {folder} failed")
    return folder


def _alone(args: argparse.Namespace, shape: Shape, folder: Path) -> Figures:
    config: dict[str, object] = {"device": args.device, "max_rows": 512}
    if args.memory:
        config["device_budget_bytes"] = stack.bytes_of(args.memory)
    rng = np.random.default_rng(0)
    runs: list[Figures] = []
    with engine(config, log=args.log) as running:
        running.load(NAME, checkpoint_of(folder, args.format, args.folder))
        for repeat in range(args.repeats + 1):
            prompts = [(NAME, rng.integers(100, shape.vocab, args.input, dtype=np.int32)) for _ in range(args.streams)]
            before = cpu_seconds(running.hello.pid)
            timeline = running.generate(prompts, args.output)
            spent = cpu_seconds(running.hello.pid).since(before)
            first = list(timeline.first_s.values())
            figures = Figures(
                timeline.tokens_per_s,
                load.quantile(first, 0.5),
                load.quantile(first, 0.99),
                load.quantile(timeline.gaps_s, 0.5),
                load.quantile(timeline.gaps_s, 0.99),
                1.0,
                _per_1000(spent, timeline.tokens),
            )
            _say("engine alone", repeat, figures)
            if repeat:
                runs.append(figures)
            else:
                running.wait_idle(args.idle)
    return _middle(runs)


def _served(args: argparse.Namespace, shape: Shape, folder: Path) -> Figures:
    flags = ["--device", args.device, *(["--memory", args.memory] if args.memory else [])]
    settings = (
        {"quantize": args.format}
        if args.format in ("int8", "fp8", "nf4", "fp4")
        else {"dtype": stack.DTYPES[args.format]}
    )
    runs: list[Figures] = []
    with stack.serve(*flags, log=args.log) as server:
        took = stack.load_and_wait(server, NAME, f"file://{folder}", **settings)
        print(f"served: ready after {server.ready_s:.1f} s, loaded in {took:.1f} s", flush=True)
        for repeat in range(args.repeats + 1):
            workload = load.Workload(args.streams, args.input, args.output, shape.vocab, seed=repeat)
            before = cpu_seconds(server.pid)
            outcome = load.run_spread(server.url, NAME, workload, args.clients)
            spent = cpu_seconds(server.pid).since(before)
            figures = Figures(
                outcome.tokens_per_s,
                outcome.ttft_p50_s,
                outcome.ttft_p99_s,
                outcome.gap_p50_s,
                outcome.gap_p99_s,
                outcome.tokens / outcome.events,
                _per_1000(spent, outcome.tokens)
                | {"client": 1e6 * outcome.client_cpu_s / args.clients / outcome.tokens},
            )
            _say("served", repeat, figures)
            if repeat:
                runs.append(figures)
            else:
                time.sleep(args.idle)
    return _middle(runs)


def _per_1000(spent: CpuSeconds, tokens: int) -> dict[str, float]:
    return {part: 1e6 * seconds / tokens for part, seconds in spent.by_part.items()}


def _middle(runs: list[Figures]) -> Figures:
    rate = statistics.median(run.tokens_per_s for run in runs)
    return min(runs, key=lambda run: abs(run.tokens_per_s - rate))


def _say(title: str, repeat: int, figures: Figures) -> None:
    what = f"run {repeat}" if repeat else "warm-up"
    cpu = ", ".join(f"{part} {value:.1f}" for part, value in figures.cpu_ms.items())
    print(
        f"{title}, {what}: {figures.tokens_per_s:,.0f} tokens/s, TTFT p50 {figures.ttft_p50_s * 1e3:.0f} ms, gap p50 {figures.gap_p50_s * 1e3:.1f} "
        f"p99 {figures.gap_p99_s * 1e3:.1f} ms, {figures.tokens_per_event:.2f} tokens an event, CPU ms per 1000 tokens: {cpu}",
        flush=True,
    )


if __name__ == "__main__":
    main()
