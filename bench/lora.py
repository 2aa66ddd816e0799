"""Measures LoRA adapters on one GPU: output tokens per second with a base alone and with rows spread over 1, 8 and 32 adapters, beside vLLM's.

    python -m bench.lora [--lines 8B/bf16,8B/nf4] [--rank 16] [--cases 1/0,1/1,32/0,…] [--folder /tmp/repertory-checkpoints]

N requests with random token ids are submitted at once, greedy, EOS ignored, row i asks for adapter i modulo their number; the figure is the median
of --repeats runs after one warm-up. Weights and adapters (of all seven linear layers) are random. A case is rows/adapters; 0 adapters is the base.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoints import SHAPES, Shape
from bench.engine import prepared
from runtime.puller.adapter.packing import FORMAT
from runtime.puller.pack.request import PACKED_NAME
from runtime.puller.pack.writer import Entry, PackedWriter
from runtime.types import Checkpoint
from tests.support.engine_process import Engine, engine

INPUT_TOKENS, OUTPUT_TOKENS = 256, 128
CASES = "1/0,1/1,32/0,32/1,32/8,32/32,256/0,256/1,256/32"
# vLLM 0.22.1 on the same machine with --enable-lora --max-lora-rank 16 --max-loras 32, Llama 8B in bf16, and the targets: output tokens per second
VLLM = {"1/1": 139, "32/1": 3266, "32/8": 2586, "32/32": 1494, "256/1": 7438, "256/32": 5607}
ASKED = {"1/1": 220, "32/1": 4900, "32/8": 4600, "32/32": 4200, "256/1": 11000, "256/32": 10400}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", default="8B/bf16")
    parser.add_argument("--cases", default=CASES, help="comma separated rows/adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/repertory-checkpoints"))
    parser.add_argument("--log", type=Path, default=None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-gib", type=float, default=0.0)
    parser.add_argument("--host-gib", type=float, default=24.0)
    args = parser.parse_args()
    cases = [(int(rows), int(count)) for rows, count in (case.split("/") for case in args.cases.split(","))]
    config = {
        "device": args.device,
        "max_rows": 512,
        "device_budget_bytes": int(args.budget_gib * 2**30),
        "host_budget_bytes": int(args.host_gib * 2**30),
    }
    most = max(count for _, count in cases)
    lines = args.lines.split(",")
    paths = {line: prepared(line, args.folder) for line in lines}
    for shape in {SHAPES[line.split("/")[0]] for line in lines}:
        for number in range(most):
            write_adapter(shape, args.rank, number, args.folder)
    with engine(config, log=args.log) as running:
        print(f"{running.hello.device_name}: {running.hello.device_budget_bytes / 2**30:.0f} GiB for models")
        for line in lines:
            measure_line(running, line, paths[line], cases, args.rank, args.repeats, args.folder)


def measure_line(
    running: Engine, line: str, path: Checkpoint, cases: list[tuple[int, int]], rank: int, repeats: int, folder: Path
) -> None:
    shape = SHAPES[line.split("/")[0]]
    loaded, took = running.load(line, path)
    print(f"\n{line}: loaded in {took:.2f} s; {loaded.facts.path}")
    adapters: list[str] = []
    loads_s: list[float] = []
    for number in range(max(count for _, count in cases)):
        name = f"{line}/adapter-{number}"
        loads_s.append(running.load(name, write_adapter(shape, rank, number, folder), adapter_of=line)[1])
        adapters.append(name)
    if loads_s:
        print(
            f"{len(adapters)} adapters of rank {rank}: loaded in {loads_s[0] * 1e3:.0f} ms the first, {statistics.median(loads_s) * 1e3:.0f} ms the median"
        )
    print(
        f"{'N':>4} {'adapters':>8} {'tok/s':>8} {'vLLM':>8} {'x':>5} {'asked':>8} {'met':>4} {'of base':>8} {'TTFT p50':>9} {'gap p50':>8} {'gap p99':>8}"
    )
    alone: dict[int, float] = {}
    for rows, count in cases:
        names = adapters[:count] or [line]
        rate = measure(running, shape, names, rows, count, repeats, alone.get(rows), is_published=line == "8B/bf16")
        if not count:
            alone[rows] = rate
    for name in adapters:
        running.unload(name)
    running.unload(line)


def measure(
    running: Engine,
    shape: Shape,
    names: list[str],
    rows: int,
    count: int,
    repeats: int,
    alone: float | None,
    *,
    is_published: bool,
) -> float:
    """Print one line of the table, and return the tokens per second. `alone`: those of the base with as many rows."""
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
        time.sleep(0.05)
    rate = statistics.median(run.tokens_per_s for run in runs)
    middle = min(runs, key=lambda run: abs(run.tokens_per_s - rate))
    case = f"{rows}/{count}"
    peer, asked = (VLLM.get(case), ASKED.get(case)) if is_published else (None, None)
    gaps = sorted(middle.gaps_s) or [float("nan")]
    print(
        f"{rows:>4} {count or 'base':>8} {rate:>8.0f} {peer or '':>8} {f'{rate / peer:.2f}' if peer else '':>5} {asked or '':>8} "
        f"{('yes' if rate >= asked else 'no') if asked else '':>4} {f'{rate / alone:.0%}' if alone and count else '':>8} "
        f"{statistics.median(middle.first_s.values()) * 1e3:>7.1f}ms {gaps[len(gaps) // 2] * 1e3:>6.2f}ms "
        f"{gaps[int(len(gaps) * 0.99)] * 1e3:>6.2f}ms",
        flush=True,
    )
    return rate


def write_adapter(shape: Shape, rank: int, number: int, folder: Path) -> Checkpoint:
    """Write a packed adapter of all linear layers with random bf16 values, unless it exists. `rank`: a power of two, as a packed rank is."""
    out = folder / f"{shape.name}-lora-{rank}-{number}"
    packed = out / PACKED_NAME
    if not packed.exists():
        out.mkdir(parents=True, exist_ok=True)
        matrices = [
            (f"model.layers.{layer}.{name}.lora_{letter}", size)
            for layer in range(shape.layers)
            for name, in_features, out_features in _linears(shape)
            for letter, size in (("A", (rank, in_features)), ("B", (out_features, rank)))
        ]
        entries = [Entry(name, "BF16", size, 2 * size[0] * size[1]) for name, size in matrices]
        writer = PackedWriter(packed, entries, {"format": FORMAT, "dtype": "bfloat16", "source": out.name})
        rng = np.random.default_rng(number)
        try:
            for name, size in matrices:
                values = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
                writer.write(name, (values.view(np.uint32) >> 16).astype(np.uint16).data.cast("B"))
            writer.finish()
        finally:
            writer.close()
    return Checkpoint(str(out), packed_file=str(packed), dtype="bfloat16", weight_bytes=packed.stat().st_size)


def _linears(shape: Shape) -> tuple[tuple[str, int, int], ...]:
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return (
        ("self_attn.q_proj", shape.hidden, wide),
        ("self_attn.k_proj", shape.hidden, narrow),
        ("self_attn.v_proj", shape.hidden, narrow),
        ("self_attn.o_proj", wide, shape.hidden),
        ("mlp.gate_proj", shape.hidden, shape.intermediate),
        ("mlp.up_proj", shape.hidden, shape.intermediate),
        ("mlp.down_proj", shape.intermediate, shape.hidden),
    )


if __name__ == "__main__":
    main()
