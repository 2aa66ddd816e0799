"""LoRA adapters in Triton: a shrink over (chunks, modules, parts of the columns) and an expand over (lanes, blocks of outputs).

The chunks of a block of outputs are dealt out to its lanes. Programs of a graph that has more chunks than the step find a rank of 0 and end. All that they read before they wait for the kernels before them
(the upload, the table, the first matrix) was written before the step began.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.adapters import FEW_TOKENS, MAX_MODULES, AdapterTable, chunk_tokens
from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.dot import dot_add, precision
from runtime.engine.kernels.scratch import Scratch

MOST_LANES = 16  # programs of an expand among which the chunks of a block of outputs are divided
_BLOCK_K = 128
_BLOCK_R = 16
_FEW_CHUNKS = 16


@triton.jit
def _chunk(c, upload_ptr, places_ptr, num_modules, module, BLOCK_T: tl.constexpr):
    """Return a chunk's first place in the order, the mask of its rows, its tokens, and where its matrices lie, with their rank."""
    live = c < tl.load(upload_ptr + 13)
    chunk_ptr = upload_ptr + tl.load(upload_ptr + 14) + 3 * c
    slot = tl.load(chunk_ptr, mask=live, other=0).to(tl.int64)
    first = tl.load(chunk_ptr + 1, mask=live, other=0)
    count = tl.load(chunk_ptr + 2, mask=live, other=0)
    place_ptr = places_ptr + (slot * num_modules + module) * 3
    a_at = tl.multiple_of(tl.load(place_ptr), 64)
    b_at = tl.multiple_of(tl.load(place_ptr + 1), 64)
    rank = tl.load(place_ptr + 2).to(tl.int32)
    rank = tl.multiple_of(tl.where(live, rank, 0), 16)
    rows = tl.arange(0, BLOCK_T)
    mask = rows < count
    tokens = tl.load(upload_ptr + tl.load(upload_ptr + 15) + first + rows, mask=mask, other=0).to(tl.int64)
    return first, mask, tokens, a_at, b_at, rank


@triton.jit(do_not_specialize=["first_module", "num_modules", "steps_each", "hidden_rows"])
def _shrink_kernel(
    x_ptr,
    upload_ptr,
    places_ptr,
    memory_ptr,
    hidden_ptr,
    K,
    x_stride,
    first_module,
    num_modules,
    steps_each,
    hidden_rows,
    HIDDEN_STRIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pdl.begin(PDL)
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else x_ptr.dtype.element_ty
    module = tl.program_id(1)
    split = tl.program_id(2)
    first, mask, tokens, a_at, _b_at, rank = _chunk(
        tl.program_id(0), upload_ptr, places_ptr, num_modules, first_module + module, BLOCK_T
    )
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    begin = split * steps_each * BLOCK_K
    num_steps = tl.minimum(steps_each, tl.cdiv(K, BLOCK_K) - split * steps_each)
    cols = begin + tl.arange(0, BLOCK_K)
    inside = (cols < K)[None, :]
    a_first_ptrs = memory_ptr + a_at + ranks.to(tl.int64)[:, None] * K + cols[None, :]
    a_first = tl.load(a_first_ptrs, mask=inside & (rank > 0), other=0.0)
    pdl.wait(PDL)
    out_ptr = hidden_ptr + ((split * hidden_rows + first).to(tl.int64) * tl.num_programs(1) + module) * HIDDEN_STRIDE
    out_ptrs = out_ptr + rows[:, None] * (tl.num_programs(1) * HIDDEN_STRIDE) + ranks[None, :]
    for r in range(0, rank, BLOCK_R):
        x_ptrs = x_ptr + tokens[:, None] * x_stride + cols[None, :]
        a_ptrs = a_first_ptrs + r * K
        x = tl.load(x_ptrs, mask=mask[:, None] & inside, other=0.0)
        a = a_first
        if r > 0:
            a = tl.load(a_ptrs, mask=inside, other=0.0)
        acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        acc = dot_add(x.to(WORK), tl.trans(a.to(WORK)), acc, PRECISION)
        for step in range(1, num_steps):
            x_ptrs += BLOCK_K
            a_ptrs += BLOCK_K
            if EVEN_K:
                x = tl.load(x_ptrs, mask=mask[:, None], other=0.0)
                a = tl.load(a_ptrs)
            else:
                further = (cols + step * BLOCK_K < K)[None, :]
                x = tl.load(x_ptrs, mask=mask[:, None] & further, other=0.0)
                a = tl.load(a_ptrs, mask=further, other=0.0)
            acc = dot_add(x.to(WORK), tl.trans(a.to(WORK)), acc, PRECISION)
        tl.store(out_ptrs + r, acc, mask=mask[:, None])


@triton.jit(do_not_specialize=["first_module", "num_modules", "num_splits", "hidden_rows"])
def _expand_kernel(
    y_ptr,
    upload_ptr,
    places_ptr,
    memory_ptr,
    hidden_ptr,
    W0,
    W1,
    W2,
    y_stride,
    first_module,
    num_modules,
    num_splits,
    hidden_rows,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pdl.begin(PDL)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    WORK: tl.constexpr = tl.float32 if PRECISION == "widen" else DTYPE
    # which module this block of outputs belongs to, and its first column
    block = tl.program_id(1)
    module = 0
    width = W0
    column = 0
    if SLICES > 1:
        blocks0 = tl.cdiv(W0, BLOCK_N)
        if block >= blocks0:
            module = 1
            block -= blocks0
            width = W1
            column = W0
            if SLICES > 2:
                blocks1 = tl.cdiv(W1, BLOCK_N)
                if block >= blocks1:
                    module = 2
                    block -= blocks1
                    width = W2
                    column = W0 + W1
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    parts = tl.arange(0, SPLITS)
    outs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = outs < width
    part_stride = hidden_rows.to(tl.int64) * (SLICES * HIDDEN_STRIDE)
    num_chunks = tl.load(upload_ptr + 13)
    if tl.program_id(0) >= num_chunks:
        pdl.wait(PDL)
    for c in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        first, mask, tokens, _a_at, b_at, rank = _chunk(
            c, upload_ptr, places_ptr, num_modules, first_module + module, BLOCK_T
        )
        b_ptrs = memory_ptr + b_at + outs.to(tl.int64)[:, None] * rank + ranks[None, :]
        b_first = tl.load(b_ptrs, mask=mask_n[:, None] & (rank > 0), other=0.0)
        pdl.wait(PDL)
        h_ptr = hidden_ptr + (first.to(tl.int64) * SLICES + module) * HIDDEN_STRIDE
        h_ptrs = h_ptr + rows[:, None] * (SLICES * HIDDEN_STRIDE) + ranks[None, :]
        # All parts at once: one after the other, each would wait for the memory.
        part_ptrs = h_ptrs[None, :, :] + parts[:, None, None] * part_stride
        mask_h = (parts < num_splits)[:, None, None] & mask[None, :, None]
        y_ptrs = y_ptr + tokens[:, None] * y_stride + (column + outs)[None, :]
        touched = mask[:, None] & mask_n[None, :] & (rank > 0)
        y = tl.load(y_ptrs, mask=touched, other=0.0).to(tl.float32)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for r in range(0, rank, BLOCK_R):
            h = tl.sum(tl.load(part_ptrs + r, mask=mask_h, other=0.0), 0)
            b = b_first
            if r > 0:
                b = tl.load(b_ptrs + r, mask=mask_n[:, None], other=0.0)
            acc = dot_add(h.to(DTYPE).to(WORK), tl.trans(b.to(WORK)), acc, PRECISION)
        tl.store(y_ptrs, (y + acc).to(DTYPE), mask=touched)


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The sums of A · x of one launch: `num_splits` parts of [tokens in the order of the chunks, modules, stride] float32."""

    parts: Tensor
    num_splits: int
    stride: int


def add_adapters(
    y: Tensor,
    x: Tensor,
    upload: Tensor,
    table: AdapterTable,
    first_module: int,
    widths: Sequence[int],
    num_chunks: int,
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.adapters.add_adapters."""
    shrunk = shrink(x, upload, table, first_module, len(widths), num_chunks, scratch)
    expand(y, shrunk, upload, table, first_module, widths, num_chunks)


def shrink(
    x: Tensor,
    upload: Tensor,
    table: AdapterTable,
    first_module: int,
    slices: int,
    num_chunks: int,
    scratch: Scratch | None = None,
) -> Shrunk:
    """Launch h = A · x for `slices` modules. Without `scratch`, the sums have memory of their own."""
    num_tokens, in_features = x.shape
    if not 0 < slices <= MAX_MODULES or x.stride(1) != 1:
        raise ValueError(f"x {list(x.shape)} with strides {x.stride()} does not fit {slices} modules")
    stride = triton.next_power_of_2(max(table.max_rank, _BLOCK_R))
    how = tiling(num_tokens, num_chunks, in_features)
    elements = how.splits * num_tokens * slices * stride
    # Every launch that uses the scratch waits for the kernels before it, so the parts live until the expand has read them.
    if scratch is not None and scratch.partials.numel() >= elements:
        parts = scratch.partials
    else:
        parts = torch.empty(elements, dtype=torch.float32, device=x.device)
    if num_tokens and num_chunks:
        _shrink_kernel[(num_chunks, slices, how.splits)](
            x,
            upload,
            table.places,
            table.memory,
            parts,
            in_features,
            x.stride(0),
            first_module,
            table.places.shape[1],
            how.steps_each,
            num_tokens,
            HIDDEN_STRIDE=stride,
            EVEN_K=in_features % how.block_k == 0,
            BLOCK_T=chunk_tokens(num_tokens, on_gpu=True),
            BLOCK_K=how.block_k,
            BLOCK_R=_BLOCK_R,
            PDL=pdl.overlaps(x),
            PRECISION=precision(x),
            num_warps=4,
            num_stages=4,
            **pdl.options(x),
        )
    return Shrunk(parts, how.splits, stride)


def expand(
    y: Tensor,
    shrunk: Shrunk,
    upload: Tensor,
    table: AdapterTable,
    first_module: int,
    widths: Sequence[int],
    num_chunks: int,
) -> None:
    """Launch y += B · h for the modules that were shrunk."""
    num_tokens = y.shape[0]
    if y.shape != (num_tokens, sum(widths)) or y.stride(1) != 1:
        raise ValueError(f"y {list(y.shape)} with strides {y.stride()} does not fit modules of widths {widths}")
    if not num_tokens or not num_chunks:
        return
    block_n = outputs_of_block(num_tokens)
    _expand_kernel[(min(num_chunks, MOST_LANES), sum(triton.cdiv(width, block_n) for width in widths))](
        y,
        upload,
        table.places,
        table.memory,
        shrunk.parts,
        *widths,
        *[0] * (MAX_MODULES - len(widths)),
        y.stride(0),
        first_module,
        table.places.shape[1],
        shrunk.num_splits,
        num_tokens,
        SLICES=len(widths),
        SPLITS=triton.next_power_of_2(shrunk.num_splits),
        HIDDEN_STRIDE=shrunk.stride,
        BLOCK_T=chunk_tokens(num_tokens, on_gpu=True),
        BLOCK_N=block_n,
        BLOCK_R=_BLOCK_R,
        PDL=pdl.overlaps(y),
        PRECISION=precision(y),
        num_warps=4,
        num_stages=2,
        **pdl.options(y),
    )


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a shrink cuts the columns: into `splits` parts of `steps_each` blocks of `block_k` columns."""

    block_k: int
    splits: int
    steps_each: int


def tiling(num_tokens: int, num_chunks: int, in_features: int) -> Tiling:
    """Cut the columns into enough parts to keep a GPU busy. Each program of the expand reads all parts, so more than these would cost more."""
    most = 8 if 1 < num_chunks <= _FEW_CHUNKS and num_tokens <= FEW_TOKENS else 4
    steps = triton.cdiv(in_features, _BLOCK_K)
    steps_each = triton.cdiv(steps, min(most, steps))
    return Tiling(_BLOCK_K, triton.cdiv(steps, steps_each), steps_each)


def outputs_of_block(num_tokens: int) -> int:
    """Return the outputs of one program of the expand."""
    return 128 if num_tokens > FEW_TOKENS else 256
