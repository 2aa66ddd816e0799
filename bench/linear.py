"""Measures a linear layer on a GPU in NF4, FP4, GGUF's Q4_0 and int8, beside cuBLAS in bf16, bitsandbytes if installed, and the floor.

    python bench/linear.py [--shapes 28672x4096,4096x4096] [--rows 1,16,256]

Weights rotate, so that none is found in the cache; launches run inside a CUDA graph; the figure is the median of its replays.
The floor is the larger of bytes / 4.2 TB/s and arithmetic / 790 TFLOP/s (measured ceilings of one H200, copy and bf16 product).
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from runtime.engine.kernels.linear4 import linear_4bit
from runtime.engine.kernels.linear8 import linear_8bit
from runtime.engine.kernels.scratch import Scratch

BYTES_PER_S = 4.2e12
OPERATIONS_PER_S = 790e12
ROTATION_BYTES = 400 << 20  # several times the L2 cache


@dataclass(frozen=True)
class Line:
    """One format's time at one shape and number of rows."""

    name: str
    time_us: float
    floor_us: float


def time_us(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median microseconds of one call, over replays of a graph that makes all calls one after another."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    spans = []
    graph.replay()
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end) * 1000 / len(calls))
    return float(statistics.median(spans))


def floor_us(num_rows: int, num_outputs: int, in_features: int, weight_bytes: int) -> float:
    """Return the least time, by bytes or by arithmetic."""
    moved = weight_bytes + 2 * num_rows * (num_outputs + in_features)
    return 1e6 * max(moved / BYTES_PER_S, 2 * num_rows * num_outputs * in_features / OPERATIONS_PER_S)


def measure(num_rows: int, num_outputs: int, in_features: int, scratch: Scratch, formats: set[str]) -> list[Line]:
    """The formats at one shape, over random weights."""
    x = torch.randn(num_rows, in_features, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(num_rows, num_outputs, device="cuda", dtype=torch.bfloat16)
    size = num_outputs * in_features
    lines = []

    def add(name: str, weight_bytes: int, make: Callable[[], Callable[[], object]], least: int = 4) -> None:
        if name not in formats:
            return
        copies = max(least, ROTATION_BYTES // weight_bytes)
        calls = [make() for _ in range(copies)]
        lines.append(
            Line(
                name, time_us(calls * max(1, 16 // copies)), floor_us(num_rows, num_outputs, in_features, weight_bytes)
            )
        )

    def bf16() -> Callable[[], object]:
        weight = torch.randn(num_outputs, in_features, device="cuda", dtype=torch.bfloat16)
        return lambda: torch.nn.functional.linear(x, weight)

    def four_bits(codebook: str) -> Callable[[], object]:
        weight = torch.randint(0, 256, (num_outputs, in_features // 2), device="cuda", dtype=torch.uint8)
        absmax = torch.rand(num_outputs, in_features // 64, device="cuda")
        if codebook == "q4_0":
            absmax = torch.rand(num_outputs, in_features // 32, device="cuda", dtype=torch.float16)
        return lambda: linear_4bit(x, weight, absmax, codebook, out=out, scratch=scratch)  # type: ignore[arg-type]

    def int8() -> Callable[[], object]:
        weight = torch.randint(-127, 128, (num_outputs, in_features), device="cuda", dtype=torch.int8)
        scale = torch.rand(num_outputs, device="cuda")
        return lambda: linear_8bit(x, weight, scale, out=out, scratch=scratch)

    def fp8() -> Callable[[], object]:
        weight = torch.randn(num_outputs, in_features, device="cuda").to(torch.float8_e4m3fn)
        scale = torch.rand(num_outputs, device="cuda")
        return lambda: linear_8bit(x, weight, scale, out=out, scratch=scratch)

    add("bf16", 2 * size, bf16)
    add("NF4", size // 2 + size // 16, lambda: four_bits("nf4"))
    add("FP4", size // 2 + size // 16, lambda: four_bits("fp4"))
    add("Q4_0", size // 2 + size // 16, lambda: four_bits("q4_0"))
    add("int8", size, int8)
    add("fp8", size, fp8)
    peer = _bitsandbytes(x, num_outputs, in_features)
    if peer is not None:
        add("bitsandbytes", size // 2 + size // 16, peer)
    return lines


def _bitsandbytes(x: torch.Tensor, num_outputs: int, in_features: int) -> Callable[[], Callable[[], object]] | None:
    try:
        import bitsandbytes
    except ImportError:
        return None

    def make() -> Callable[[], object]:
        weight = torch.randn(num_outputs, in_features, device="cuda", dtype=torch.bfloat16)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="28672x4096,6144x4096,4096x4096,4096x14336", help="outputs x inputs")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,1024")
    parser.add_argument("--formats", default="bf16,NF4,FP4,Q4_0,int8,fp8,bitsandbytes")
    options = parser.parse_args()
    scratch = Scratch.allocate("cuda", staging_bytes=256 << 20)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds (share of the floor)")
    for shape in options.shapes.split(","):
        num_outputs, in_features = (int(part) for part in shape.split("x"))
        print(f"\n{shape}")
        for index, num_rows in enumerate(int(part) for part in options.rows.split(",")):
            lines = measure(num_rows, num_outputs, in_features, scratch, set(options.formats.split(",")))
            if index == 0:
                print(f"| {'M':>5} | " + " | ".join(f"{line.name:>16}" for line in lines) + " |")
                print("|--:|" + "--:|" * len(lines))
            cells = (f"{line.time_us:8.1f} ({line.floor_us / line.time_us:4.0%})" for line in lines)
            print(f"| {num_rows:>5} | " + " | ".join(f"{cell:>16}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
