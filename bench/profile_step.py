"""Profiles a decode step: runs the engine's loop in this process on one GPU, under torch's profiler.

    python -m bench.profile_step [--model 8B/bf16] [--rows 1,64,256] [--context 256] [--top 12]

For each number of rows: the wall and device time of a step in steady state, the share of time in which the GPU ran nothing, time for each family of
kernels, and what the engine thread's Python costs (by cProfile, whose own cost is in it). The weights are random.
"""

import argparse
import cProfile
import io
import pstats
import queue
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from bench import limits
from bench.checkpoints import SHAPES, write
from bench.packed import checkpoint_of, random_packed
from runtime.config.schema import EngineConfig
from runtime.engine.core.loop import EngineLoop
from runtime.engine.device.backend import make_backend
from runtime.ipc import messages
from runtime.types import GenerationRequest, SamplingParams, StopParams

FAMILIES = (
    ("linear", ("linear16", "linear4", "linear8", "gemm", "gemv", "cublas", "cutlass", "nvjet", "splitk", "quantize")),
    ("attention", ("attention_decode", "decode_kernel", "mixed_kernel")),
    ("rope and KV", ("_rope_kernel", "_write_kernel")),
    ("norm", ("_norm_kernel",)),
    ("activation", ("_act_mul",)),
    ("draw", ("argmax", "reduce", "_draw", "_best", "_commit")),
    ("inputs", ("_rows_kernel", "_blocks_kernel", "_embed", "index", "memcpy", "memset")),
)  # fmt: skip


class Harness:
    """An engine loop that the caller advances."""

    def __init__(self, config: EngineConfig) -> None:
        self.inbox: queue.SimpleQueue[messages.Command | None] = queue.SimpleQueue()
        self.events: list[messages.Event] = []
        self.backend = make_backend(config)
        self.loop = EngineLoop(config, self.backend, self.inbox, self.events.append, lambda _: None, time.monotonic)
        self._next_id = 1

    def load(self, command: messages.Load) -> messages.Loaded:
        self.inbox.put(command)
        while True:
            if not self.loop.turn():
                time.sleep(0.005)
            for event in self.events:
                if isinstance(event, messages.LoadFailed):
                    raise RuntimeError(event.message)
                if isinstance(event, messages.Loaded):
                    self.events.clear()
                    return event

    def add(self, model_id: str, rows: int, input_tokens: int, output_tokens: int, vocab: int) -> None:
        rng = np.random.default_rng(self._next_id)
        for _ in range(rows):
            ids = rng.integers(100, vocab, input_tokens, dtype=np.int32)
            request = GenerationRequest(
                prompt=tuple(ids.tolist()),
                sampling=SamplingParams(temperature=0.0),
                stop=StopParams(max_tokens=output_tokens, ignore_eos=True),
            )
            self.inbox.put(messages.Add(self._next_id, model_id, request))
            self._next_id += 1

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.loop.turn()
        self.events.clear()

    def finish(self) -> None:
        while self.loop.turn():
            pass
        self.events.clear()

    def rest(self) -> None:
        """Run idle turns until warmup and graph captures have ended."""
        quiet = 0
        while quiet < 10:
            quiet = 0 if self.loop.idle() else quiet + 1
            if quiet:
                time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8B/bf16")
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--python", action="store_true", help="print the engine thread's costliest functions")
    parser.add_argument("--no-kernels", action="store_true")
    args = parser.parse_args()
    name, format_ = args.model.split("/")
    shape = SHAPES[name]
    checkpoint = (
        random_packed(shape, format_, args.folder)
        if format_ != "bf16"
        else checkpoint_of(write(shape, args.folder / name), format_, args.folder)
    )
    started = time.perf_counter()
    harness = Harness(EngineConfig(device="cuda", host_budget_bytes=24 << 30))
    print(f"backend after {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    facts = harness.load(messages.Load("model", checkpoint)).facts
    print(f"{args.model}: loaded in {time.perf_counter() - started:.2f} s, {facts.path}")
    for rows in map(int, args.rows.split(",")):
        for turn in range(2):
            started = time.perf_counter()
            harness.add("model", rows, args.context, 40, shape.vocab)
            harness.finish()
            print(f"  warm-up {turn}, {rows} rows: {time.perf_counter() - started:.2f} s")
            harness.rest()
        measure(harness, rows, args, limits.decode_step_s(shape, format_, rows, args.context + 100) * 1e6)


def measure(harness: Harness, rows: int, args: argparse.Namespace, floor_us: float) -> None:
    shape = SHAPES[args.model.split("/")[0]]
    harness.add("model", rows, args.context, 240, shape.vocab)
    began = time.perf_counter()
    while not harness.events:
        harness.loop.turn()
    first_ms = (time.perf_counter() - began) * 1e3
    harness.turns(20 + rows * args.context // 8192)
    walls = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        harness.turns(15)
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - began) / 15 * 1e6)
    wall_us = statistics.median(walls)
    began, busy_from = time.perf_counter(), time.thread_time()
    harness.turns(20)
    thread_us = (time.thread_time() - busy_from) / 20 * 1e6
    print(
        f"\n{args.model} {rows} rows, context {args.context}: step {wall_us:.0f} us, floor {floor_us:.0f} us ({floor_us / wall_us:.0%}), "
        f"first token after {first_ms:.1f} ms, engine thread busy {thread_us:.0f} us a step"
    )
    if args.python:
        profile = cProfile.Profile()
        profile.enable()
        harness.turns(20)
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(14)
        for line in text.getvalue().splitlines()[4:]:
            if line.strip():
                print("   ", line[:150])
    if not args.no_kernels:
        kernels(harness, args.top)
    harness.finish()


def kernels(harness: Harness, top: int) -> None:
    steps = 12
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        harness.turns(steps)
        torch.cuda.synchronize()
    spans = []
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or ():
        if str(event.device_type).endswith("CUDA"):
            spans.append((event.time_range.start, event.time_range.end))
            by_name[event.name].append(event.time_range.elapsed_us())
    if not spans:
        print("  the profiler saw no kernels")
        return
    spans.sort()
    covered, reached = 0.0, spans[0][0]
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    print(
        f"  GPU idle {1 - covered / total:.1%} of {total / steps:.0f} us a step; {len(spans) / steps:.0f} launches a step"
    )
    families: dict[str, float] = defaultdict(float)
    for kernel, times in by_name.items():
        family = next((f for f, marks in FAMILIES if any(mark in kernel.lower() for mark in marks)), "other")
        families[family] += sum(times) / steps
    print(
        "  " + ", ".join(f"{family} {us:.0f} us" for family, us in sorted(families.items(), key=lambda item: -item[1]))
    )
    for kernel, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
        print(
            f"    {sum(times) / steps:8.1f} us {len(times) / steps:6.1f}x {statistics.median(times):7.2f} us  {kernel[:110]}"
        )


if __name__ == "__main__":
    main()
