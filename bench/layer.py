"""Measures one decoder layer on a GPU, as the chain of launches of a decode step, beside the floor.

    python -m bench.layer [--models 8B/bf16,1B/bf16,8B/fp8,8B/int8] [--rows 1,8,16,32,64] [--context 300]

Eight layers of their own random weights, one after another in a CUDA graph, median of its replays; the products alone likewise. Beside bf16's are
those of a layer whose products are the library's. The floor is the weights at the 4.45 TB/s that the output projection reads at.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.linear import time_us
from runtime.engine.kernels.attention import paged_attention
from runtime.engine.kernels.quantized_rows import quantize_rows
from runtime.engine.kernels.rope import rope_and_cache
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.run.layer_inputs import gated, input_codes, normed, product
from runtime.engine.model.run.linear import Linear, Linear8, PlainLinear

BYTES_PER_S = 4.45e12
LAYERS, BLOCK = 8, 16


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {"8B": Shape(4096, 14336, 32, 8, 128), "1B": Shape(2048, 8192, 32, 8, 64)}


@dataclass(frozen=True)
class LibraryLinear:
    """A linear layer by the library's product."""

    weight: Tensor

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return functional.linear(x, self.weight)


CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Weights:
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    size_bytes: int

    @staticmethod
    def random(shape: Shape, format_: str) -> "Weights":
        width = shape.heads * shape.head_dim
        sizes = (
            (width + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
            (shape.hidden, width),
            (2 * shape.inner, shape.hidden),
            (shape.hidden, shape.inner),
        )
        num_bytes = sum(rows * columns for rows, columns in sizes) * (2 if format_ == "bf16" else 1)
        qkv, out, gate_up, down = (_random_linear(rows, columns, format_) for rows, columns in sizes)
        return Weights(qkv, out, gate_up, down, num_bytes)

    def by_library(self) -> "Weights | None":
        """Return the same weights in layers of the library's, or None if they are quantised."""
        plain = [one for one in (self.qkv, self.out, self.gate_up, self.down) if isinstance(one, PlainLinear)]
        if not plain:
            return None
        qkv, out, gate_up, down = (LibraryLinear(one.weight) for one in plain)
        return Weights(qkv, out, gate_up, down, self.size_bytes)


def _random_linear(rows: int, columns: int, format_: str) -> Linear:
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(columns**-0.5)
    if format_ == "bf16":
        return PlainLinear(weight)
    quantized = quantize_rows(weight, CODES[format_])
    return Linear8(quantized.codes, quantized.scale)


class Chain:
    """One batch of rows and its KV, and the calls of a layer over it."""

    def __init__(self, shape: Shape, num_rows: int, context: int, scratch: Scratch) -> None:
        self._shape, self._context, self._scratch = shape, context, scratch
        pages = -(-context // BLOCK)
        self._unit = BLOCK * shape.kv_heads * shape.head_dim

        def half(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

        self._planes = [
            (half(num_rows * pages * self._unit), half(num_rows * pages * self._unit)) for _ in range(LAYERS)
        ]
        counts = torch.arange(num_rows * pages, device="cuda", dtype=torch.int32)
        self._table = counts.view(num_rows, pages)
        self._rows = counts[:num_rows].clone()
        self._starts = torch.arange(num_rows + 1, device="cuda", dtype=torch.int32)
        self._lengths = torch.full_like(self._rows, context)
        last = context - 1
        self._slots = self._table[:, last // BLOCK].long() * self._unit + last % BLOCK * shape.kv_heads * shape.head_dim
        self._cos, self._sin = half(num_rows, shape.head_dim), half(num_rows, shape.head_dim)
        self._residual, self._branch, self._weight = (
            half(num_rows, shape.hidden),
            half(num_rows, shape.hidden),
            half(shape.hidden),
        )
        self._q = half(num_rows, shape.heads, shape.head_dim)
        self._mixed = half(num_rows, shape.heads, shape.head_dim)

    def layer(self, index: int, weights: Weights) -> None:
        shape, (k_plane, v_plane) = self._shape, self._planes[index]
        hidden, _ = normed(self._branch, self._residual, self._weight, 1e-5, False, input_codes(weights.qkv))
        rope_and_cache(
            self._q,
            product(weights.qkv, hidden, self._scratch),
            self._cos,
            self._sin,
            self._slots,
            k_plane,
            v_plane,
            num_q_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotary_dim=shape.head_dim,
        )
        paged_attention(
            self._mixed,
            self._q,
            k_plane,
            v_plane,
            self._unit,
            self._table,
            self._rows,
            self._starts,
            self._lengths,
            block_tokens=BLOCK,
            num_kv_heads=shape.kv_heads,
            scale=shape.head_dim**-0.5,
            max_query_len=1,
            max_context_len=1024,
            scratch=self._scratch,
        )
        branch = product(weights.out, self._mixed.flatten(1), self._scratch)
        hidden, _ = normed(branch, self._residual, self._weight, 1e-5, False, input_codes(weights.gate_up))
        inner = gated(weights.gate_up, hidden, "silu", input_codes(weights.down), self._scratch)
        self._branch = product(weights.down, inner, self._scratch)

    def products(self, weights: Weights) -> None:
        """Run the layer's products and what quantises their inputs."""
        product(weights.qkv, self._branch, self._scratch)
        branch = product(weights.out, self._mixed.flatten(1), self._scratch)
        codes = input_codes(weights.gate_up)
        x = branch if codes is None else quantize_rows(branch, codes)
        inner = gated(weights.gate_up, x, "silu", input_codes(weights.down), self._scratch)
        product(weights.down, inner, self._scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B/bf16,1B/bf16,8B/fp8,8B/int8")
    parser.add_argument("--rows", default="1,8,16,32,64")
    parser.add_argument("--context", type=int, default=300)
    options = parser.parse_args()
    scratch = Scratch.allocate("cuda")
    print("| model | rows | a layer, us | with the library's products | products alone | the library's | floor |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for name in options.models.split(","):
        shape_name, _, format_ = name.partition("/")
        shape = SHAPES[shape_name]
        weights = [Weights.random(shape, format_) for _ in range(LAYERS)]
        library = [layer for layer in (one.by_library() for one in weights) if layer is not None]
        floor_us = weights[0].size_bytes / BYTES_PER_S * 1e6
        for num_rows in map(int, options.rows.split(",")):
            chain = Chain(shape, num_rows, options.context, scratch)

            def layers(weights: list[Weights], chain: Chain = chain) -> list[Callable[[], object]]:
                return [lambda i=i, w=w: chain.layer(i, w) for i, w in enumerate(weights)]  # type: ignore[misc]

            def products(weights: list[Weights], chain: Chain = chain) -> list[Callable[[], object]]:
                return [lambda w=w: chain.products(w) for w in weights]  # type: ignore[misc]

            calls = (layers(weights), layers(library), products(weights), products(library))
            cells = [f"{time_us(some):.1f}" if some else "" for some in calls]
            print(f"| {name} | {num_rows} | " + " | ".join((*cells, f"{floor_us:.1f}")) + " |", flush=True)


if __name__ == "__main__":
    main()
