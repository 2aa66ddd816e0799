"""Launches the kernels of LoRA adapters, shrink and expand: in CUDA C++ (`adapters_cuda.py`) where they support the operands, otherwise in
Triton (`adapters_triton.py`), whose work is cut here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from runtime.engine.kernels.activation import GATE_CODES, Activation
from runtime.engine.kernels.adapters import MAX_MODULES, SMALL_CHUNK, AdapterTable, Chunks
from runtime.engine.kernels.gpu import adapters_cuda, pdl
from runtime.engine.kernels.gpu.adapters_triton import expand_kernel, gated_expand_kernel, shrink_kernel
from runtime.engine.kernels.gpu.dot import precision
from runtime.engine.kernels.scratch import Scratch

MOST_LANES = 16  # programs of an expand among which the chunks of a block of outputs are divided
_BLOCK_K, _BLOCK_K_OF_LARGE = 128, 64  # columns of a shrink's step, for small and large chunks
_BLOCK_R = 16
_FEW_CHUNKS = 16
_MANY_PROGRAMS = 256  # of a shrink: about two for each multiprocessor


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The sums of A · x of one launch: float32 [blocks of 16 ranks, `num_splits`, tokens in the order of the chunks, modules, 16].

    Blocks of ranks come first, because most adapters have few ranks and the memory has room for the largest.
    """

    parts: Tensor
    num_splits: int


def add_adapters(
    y: Tensor,
    x: Tensor,
    chunks: Chunks,
    table: AdapterTable,
    first_module: int,
    widths: Sequence[int],
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.adapters.add_adapters."""
    expand(y, shrink(x, chunks, table, first_module, len(widths), scratch), chunks, table, first_module, widths)


def add_adapters_gated(
    y: Tensor,
    x: Tensor,
    chunks: Chunks,
    table: AdapterTable,
    activation: Activation,
    first_module: int,
    widths: Sequence[int],
    scratch: Scratch | None,
) -> Tensor:
    """See runtime.engine.kernels.adapters.add_adapters_gated."""
    shrunk = shrink(x, chunks, table, first_module, len(widths), scratch)
    return expand_gated(y, shrunk, chunks, table, activation, first_module, widths)


def shrink(
    x: Tensor, chunks: Chunks, table: AdapterTable, first_module: int, slices: int, scratch: Scratch | None = None
) -> Shrunk:
    """Launch h = A · x for `slices` modules. Without `scratch`, the sums have memory of their own."""
    num_tokens, in_features = x.shape
    if not 0 < slices <= MAX_MODULES or x.stride(1) != 1:
        raise ValueError(f"x {list(x.shape)} with strides {x.stride()} does not fit {slices} modules")
    if num_tokens and chunks.most:
        hidden = adapters_cuda.shrink(x, chunks, table, first_module, slices, scratch)
        if hidden is not None:
            return Shrunk(hidden, 1)
    how = tiling(chunks, in_features, slices)
    elements = how.splits * num_tokens * slices * triton.cdiv(table.max_rank, _BLOCK_R) * _BLOCK_R
    # Every launch that uses the scratch waits for the kernels before it, so the parts live until the expand has read them.
    if scratch is not None and scratch.partials.numel() >= elements:
        parts = scratch.partials
    else:
        parts = torch.empty(elements, dtype=torch.float32, device=x.device)
    if num_tokens and chunks.most:
        shrink_kernel[(chunks.most, slices // how.modules_each, how.splits)](
            x,
            chunks.upload,
            table.places,
            table.memory,
            parts,
            in_features,
            x.stride(0),
            chunks.word,
            first_module,
            table.places.shape[1],
            how.steps_each,
            num_tokens,
            SLICES=slices,
            EACH=how.modules_each,
            EVEN_K=in_features % how.block_k == 0,
            BLOCK_T=chunks.tokens,
            BLOCK_K=how.block_k,
            BLOCK_R=_BLOCK_R,
            PDL=pdl.overlaps(x),
            PRECISION=precision(x),
            num_warps=4,
            num_stages=4,
            **pdl.options(x),
        )
    return Shrunk(parts, how.splits)


def expand(
    y: Tensor, shrunk: Shrunk, chunks: Chunks, table: AdapterTable, first_module: int, widths: Sequence[int]
) -> None:
    """Launch y += B · h for the modules that were shrunk."""
    num_tokens = y.shape[0]
    if y.shape != (num_tokens, sum(widths)) or y.stride(1) != 1:
        raise ValueError(f"y {list(y.shape)} with strides {y.stride()} does not fit modules of widths {widths}")
    if not num_tokens or not chunks.most:
        return
    if adapters_cuda.expand(y, None, shrunk.parts, shrunk.num_splits, chunks, table, first_module, widths):
        return
    block_n, num_warps = outputs_of_block(chunks)
    expand_kernel[(min(chunks.most, MOST_LANES), sum(triton.cdiv(width, block_n) for width in widths))](
        y,
        chunks.upload,
        table.places,
        table.memory,
        shrunk.parts,
        *widths,
        *[0] * (MAX_MODULES - len(widths)),
        y.stride(0),
        chunks.word,
        first_module,
        table.places.shape[1],
        shrunk.num_splits,
        num_tokens,
        SLICES=len(widths),
        SPLITS=parts_read(shrunk.num_splits),
        BLOCK_T=chunks.tokens,
        BLOCK_N=block_n,
        BLOCK_R=_BLOCK_R,
        PDL=pdl.overlaps(y),
        PRECISION=precision(y),
        num_warps=num_warps,
        num_stages=2,
        **pdl.options(y),
    )


def expand_gated(
    y: Tensor,
    shrunk: Shrunk,
    chunks: Chunks,
    table: AdapterTable,
    activation: Activation,
    first_module: int,
    widths: Sequence[int],
) -> Tensor:
    """Launch act(gate + B · h) × (up + B · h) for the modules that were shrunk: gate and up, or one module of both."""
    num_tokens, width = y.shape[0], y.shape[1] // 2
    if tuple(widths) not in ((width, width), (2 * width,)) or y.stride(1) != 1:
        raise ValueError(f"y {list(y.shape)} with strides {y.stride()} does not fit gate and up of widths {widths}")
    out = y.new_empty((num_tokens, width))
    if not num_tokens or not chunks.most:
        return out
    if adapters_cuda.expand(y, out, shrunk.parts, shrunk.num_splits, chunks, table, first_module, widths, activation):
        return out
    block_n, num_warps = gated_outputs_of_block(chunks)
    gated_expand_kernel[(min(chunks.most, MOST_LANES), triton.cdiv(width, block_n))](
        out,
        y,
        chunks.upload,
        table.places,
        table.memory,
        shrunk.parts,
        width,
        y.stride(0),
        chunks.word,
        first_module,
        table.places.shape[1],
        shrunk.num_splits,
        num_tokens,
        KIND=GATE_CODES[activation],
        SLICES=len(widths),
        SPLITS=parts_read(shrunk.num_splits),
        BLOCK_T=chunks.tokens,
        BLOCK_N=block_n,
        BLOCK_R=_BLOCK_R,
        PDL=pdl.overlaps(y),
        PRECISION=precision(y),
        num_warps=num_warps,
        num_stages=2,
        **pdl.options(y),
    )
    return out


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a shrink cuts its work: the columns into `splits` parts of `steps_each` blocks of `block_k` columns, the modules by `modules_each`."""

    block_k: int
    splits: int
    steps_each: int
    modules_each: int


def tiling(chunks: Chunks, in_features: int, slices: int) -> Tiling:
    """Cut the columns into enough parts to keep a GPU busy. Each program of the expand reads all parts, so more than these would cost more.

    Large chunks alone are enough programs, so each reads its rows of x once, for all modules.
    """
    is_small = chunks.tokens <= SMALL_CHUNK
    block_k = _BLOCK_K if is_small else _BLOCK_K_OF_LARGE
    if is_small:
        most = 8 if 1 < chunks.most <= _FEW_CHUNKS else 4
    else:
        most = min(4, triton.cdiv(_MANY_PROGRAMS, chunks.most))
    steps = triton.cdiv(in_features, block_k)
    steps_each = triton.cdiv(steps, min(most, steps))
    return Tiling(block_k, triton.cdiv(steps, steps_each), steps_each, 1 if is_small else slices)


def parts_read(num_splits: int) -> int:
    """Return how many parts an expand is compiled to read, 4 or 8 and at least as many as there are, so that a load compiles all that steps need."""
    return 4 if num_splits <= 4 else 8


def outputs_of_block(chunks: Chunks) -> tuple[int, int]:
    """Return the outputs and the warps of one program of the expand."""
    return (128, 4) if chunks.tokens <= SMALL_CHUNK else (128, 8)


def gated_outputs_of_block(chunks: Chunks) -> tuple[int, int]:
    """Return the outputs, each of a gate and an up, and the warps of one program of the gated expand."""
    return (128, 4) if chunks.tokens <= SMALL_CHUNK else (64, 8)
