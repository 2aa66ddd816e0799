"""LoRA adapters in Triton: a shrink over (chunks, modules, parts of the columns) and an expand over (chunks, blocks of outputs).

Programs of a graph that has more chunks than the step find a rank of 0 and end. All that they read before they wait for the kernels before them
(the upload, the table, the first matrix) was written before the step began.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.adapters import FEW_TOKENS, MAX_MODULES, AdapterTable, chunk_tokens
from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.dot import dot_add, precision
from runtime.engine.kernels.scratch import Scratch

_BLOCK_K = 128
_BLOCK_R = 16
_VERY_FEW_TOKENS = 64


@triton.jit
def _chunk(upload_ptr, places_ptr, num_modules, module, BLOCK_T: tl.constexpr):
    """Return this program's first place in the order, the mask of its rows, its tokens, and where its matrices lie, with their rank."""
    c = tl.program_id(0)
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
    first, mask, tokens, a_at, _b_at, rank = _chunk(upload_ptr, places_ptr, num_modules, first_module + module, BLOCK_T)
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
    first, mask, tokens, _a_at, b_at, rank = _chunk(upload_ptr, places_ptr, num_modules, first_module + module, BLOCK_T)
    rows = tl.arange(0, BLOCK_T)
    ranks = tl.arange(0, BLOCK_R)
    outs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = outs < width
    b_ptrs = memory_ptr + b_at + outs.to(tl.int64)[:, None] * rank + ranks[None, :]
    b_first = tl.load(b_ptrs, mask=mask_n[:, None] & (rank > 0), other=0.0)
    pdl.wait(PDL)
    h_ptr = hidden_ptr + (first.to(tl.int64) * SLICES + module) * HIDDEN_STRIDE
    h_ptrs = h_ptr + rows[:, None] * (SLICES * HIDDEN_STRIDE) + ranks[None, :]
    # All parts at once: one after the other, each would wait for the memory.
    parts = tl.arange(0, SPLITS)
    part_ptrs = h_ptrs[None, :, :] + parts[:, None, None] * (hidden_rows.to(tl.int64) * (SLICES * HIDDEN_STRIDE))
    mask_h = (parts < num_splits)[:, None, None] & mask[None, :, None]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r in range(0, rank, BLOCK_R):
        h = tl.sum(tl.load(part_ptrs + r, mask=mask_h, other=0.0), 0)
        b = b_first
        if r > 0:
            b = tl.load(b_ptrs + r, mask=mask_n[:, None], other=0.0)
        acc = dot_add(h.to(DTYPE).to(WORK), tl.trans(b.to(WORK)), acc, PRECISION)
    y_ptrs = y_ptr + tokens[:, None] * y_stride + (column + outs)[None, :]
    touched = mask[:, None] & mask_n[None, :] & (rank > 0)
    y = tl.load(y_ptrs, mask=touched, other=0.0).to(tl.float32)
    tl.store(y_ptrs, (y + acc).to(DTYPE), mask=touched)


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
    num_tokens, in_features = x.shape
    slices = len(widths)
    if not 0 < slices <= MAX_MODULES or y.shape != (num_tokens, sum(widths)) or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} do not fit {slices} modules of widths {widths}")
    if num_tokens == 0 or num_chunks == 0:
        return
    hidden_stride = triton.next_power_of_2(max(table.max_rank, _BLOCK_R))
    block_k, splits, steps_each = splitting(num_tokens, in_features)
    elements = splits * num_tokens * slices * hidden_stride
    # Every launch that uses the scratch waits for the kernels before it, so the parts live until the expand has read them.
    if scratch is not None and scratch.partials.numel() >= elements:
        hidden = scratch.partials
    else:
        hidden = torch.empty(elements, dtype=torch.float32, device=x.device)
    block_t = chunk_tokens(num_tokens, on_gpu=True)
    block_n = 64 if num_tokens <= _VERY_FEW_TOKENS else 128
    num_modules = table.places.shape[1]
    overlaps, kind, options = pdl.overlaps(x), precision(x), pdl.options(x)
    _shrink_kernel[(num_chunks, slices, splits)](
        x,
        upload,
        table.places,
        table.memory,
        hidden,
        in_features,
        x.stride(0),
        first_module,
        num_modules,
        steps_each,
        num_tokens,
        HIDDEN_STRIDE=hidden_stride,
        EVEN_K=in_features % block_k == 0,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_R=_BLOCK_R,
        PDL=overlaps,
        PRECISION=kind,
        num_warps=4,
        num_stages=4,
        **options,
    )
    more = [*widths, *[0] * (MAX_MODULES - slices)]
    _expand_kernel[(num_chunks, sum(triton.cdiv(width, block_n) for width in widths))](
        y,
        upload,
        table.places,
        table.memory,
        hidden,
        *more,
        y.stride(0),
        first_module,
        num_modules,
        splits,
        num_tokens,
        SLICES=slices,
        SPLITS=triton.next_power_of_2(splits),
        HIDDEN_STRIDE=hidden_stride,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_R=_BLOCK_R,
        PDL=overlaps,
        PRECISION=kind,
        num_warps=4,
        num_stages=2,
        **options,
    )


def splitting(num_tokens: int, in_features: int) -> tuple[int, int, int]:
    """Return the columns of a block, the parts that the columns are cut into, and the blocks in each.

    The parts of a step are within 1,024 rows of sums. Where tokens are few, a part is one block, which is loaded before the kernels before have ended.
    """
    if num_tokens <= _VERY_FEW_TOKENS:
        block_k, most = (512 if in_features > 8192 else 256), (32 if num_tokens <= _VERY_FEW_TOKENS // 2 else 16)
    else:
        block_k, most = _BLOCK_K, (4 if num_tokens <= FEW_TOKENS else 1)
    steps = triton.cdiv(in_features, block_k)
    steps_each = triton.cdiv(steps, min(most, max(1, steps if block_k > _BLOCK_K else steps // 2)))
    return block_k, triton.cdiv(steps, steps_each), steps_each
