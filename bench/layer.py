"""Measures one decoder layer on a GPU, as the chain of launches of a decode step, beside the floor.

    python -m bench.layer [--models 8B,1B] [--rows 1,8,16,32,64] [--context 300]

Eight layers of their own random bf16 weights, one after another in a CUDA graph, median of its replays; the products alone likewise. Without our
16-bit linears the products are the library's. The floor is the weights at the 4.45 TB/s that the output projection reads at.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.linear import time_us
from runtime.engine.kernels.activation import act_mul
from runtime.engine.kernels.attention import paged_attention
from runtime.engine.kernels.linear16 import linear_16bit, serves
from runtime.engine.kernels.norm import add_rms_norm
from runtime.engine.kernels.rope import rope_and_cache
from runtime.engine.kernels.scratch import Scratch

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
class Weights:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    @staticmethod
    def random(shape: Shape) -> "Weights":
        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(columns**-0.5)

        width = shape.heads * shape.head_dim
        qkv = matrix(width + 2 * shape.kv_heads * shape.head_dim, shape.hidden)
        return Weights(
            qkv, matrix(shape.hidden, width), matrix(2 * shape.inner, shape.hidden), matrix(shape.hidden, shape.inner)
        )

    @property
    def size_bytes(self) -> int:
        return sum(2 * weight.numel() for weight in (self.qkv, self.out, self.gate_up, self.down))


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

    def layer(self, index: int, weights: Weights, ours: bool) -> None:
        shape, (k_plane, v_plane) = self._shape, self._planes[index]
        hidden, _ = add_rms_norm(self._branch, self._residual, self._weight, 1e-5)
        rope_and_cache(
            self._q,
            self._product(hidden, weights.qkv, ours),
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
        branch = self._product(self._mixed.flatten(1), weights.out, ours)
        hidden, _ = add_rms_norm(branch, self._residual, self._weight, 1e-5)
        self._branch = self._product(self._gated(hidden, weights.gate_up, ours), weights.down, ours)

    def products(self, weights: Weights, ours: bool) -> None:
        self._product(self._branch, weights.qkv, ours)
        branch = self._product(self._mixed.flatten(1), weights.out, ours)
        self._product(self._gated(branch, weights.gate_up, ours), weights.down, ours)

    def _product(self, x: Tensor, weight: Tensor, ours: bool) -> Tensor:
        return (
            linear_16bit(x, weight, scratch=self._scratch)
            if ours and serves(x, weight)
            else functional.linear(x, weight)
        )

    def _gated(self, x: Tensor, weight: Tensor, ours: bool) -> Tensor:
        return (
            linear_16bit(x, weight, gate="silu", scratch=self._scratch)
            if ours and serves(x, weight)
            else act_mul(functional.linear(x, weight), "silu")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B,1B")
    parser.add_argument("--rows", default="1,8,16,32,64")
    parser.add_argument("--context", type=int, default=300)
    options = parser.parse_args()
    scratch = Scratch.allocate("cuda")
    print("| model | rows | a layer, us | with the library's products | products alone | the library's | floor |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for name in options.models.split(","):
        weights = [Weights.random(SHAPES[name]) for _ in range(LAYERS)]
        floor_us = weights[0].size_bytes / BYTES_PER_S * 1e6
        for num_rows in map(int, options.rows.split(",")):
            chain = Chain(SHAPES[name], num_rows, options.context, scratch)

            def layers(
                ours: bool, chain: Chain = chain, weights: list[Weights] = weights
            ) -> list[Callable[[], object]]:
                return [lambda i=i, w=w: chain.layer(i, w, ours) for i, w in enumerate(weights)]  # type: ignore[misc]

            def products(
                ours: bool, chain: Chain = chain, weights: list[Weights] = weights
            ) -> list[Callable[[], object]]:
                return [lambda w=w: chain.products(w, ours) for w in weights]  # type: ignore[misc]

            times = [time_us(calls) for calls in (layers(True), layers(False), products(True), products(False))]
            print(
                f"| {name} | {num_rows} | " + " | ".join(f"{time:.1f}" for time in (*times, floor_us)) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
