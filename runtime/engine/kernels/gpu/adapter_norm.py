"""The expand of a product whose output is added to the residual and normalised, in Triton: one program per token, with its row in registers."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.adapters import AdapterTable
from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.adapters import BLOCK_R, Shrunk
from runtime.engine.kernels.gpu.adapters_triton import locate
from runtime.engine.kernels.gpu.norm import normalised

_NUM_WARPS = 16  # A row of 4,096 outputs has 128 KiB of B, half of the registers of a multiprocessor.


@triton.jit(do_not_specialize=["module", "num_modules", "num_splits", "hidden_rows"])
def adapted_norm_kernel(
    y_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    upload_ptr,
    places_ptr,
    memory_ptr,
    hidden_ptr,
    y_stride,
    width,
    eps,
    module,
    num_modules,
    num_splits,
    hidden_rows,
    PLUS_ONE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take the places of the order, then the padding tokens, which have no adapter."""
    pdl.begin(PDL)
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    place = tl.program_id(0)
    live = place < tl.load(upload_ptr + 1)
    ordered = tl.load(upload_ptr + tl.load(upload_ptr + 15) + place, mask=live, other=0)
    token = tl.where(live, ordered, place).to(tl.int64)
    slot = tl.load(upload_ptr + tl.load(upload_ptr + 19) + place, mask=live, other=-1).to(tl.int64)
    _, b_at, rank = locate(slot, module, places_ptr, num_modules)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    ranks = tl.arange(0, BLOCK_R)
    b_ptrs = memory_ptr + b_at + (cols[:, None] * rank + ranks[None, :])
    b = tl.load(b_ptrs, mask=mask[:, None] & (rank > 0), other=0.0)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    pdl.wait(PDL)
    y = tl.load(y_ptr + token * y_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + token * width + cols, mask=mask, other=0.0)
    parts = tl.arange(0, SPLITS)
    part_ptrs = hidden_ptr + (parts[:, None] * hidden_rows + place) * BLOCK_R + ranks[None, :]
    rank_stride = hidden_rows.to(tl.int64) * num_splits
    h = tl.sum(tl.load(part_ptrs, mask=(parts < num_splits)[:, None] & (rank > 0), other=0.0), 0).to(DTYPE)
    added = tl.sum(b.to(tl.float32) * h.to(tl.float32)[None, :], 1)
    for r in range(BLOCK_R, rank, BLOCK_R):
        h = tl.sum(tl.load(part_ptrs + r * rank_stride, mask=(parts < num_splits)[:, None], other=0.0), 0).to(DTYPE)
        b = tl.load(b_ptrs + r, mask=mask[:, None], other=0.0)
        added += tl.sum(b.to(tl.float32) * h.to(tl.float32)[None, :], 1)
    y = (y.to(tl.float32) + added).to(DTYPE)
    x = (y.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
    tl.store(residual_ptr + token * width + cols, x, mask=mask)
    out = normalised(x, weight, width, eps, PLUS_ONE)
    tl.store(out_ptr + token * width + cols, out.to(DTYPE), mask=mask)


def add_rms_norm(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    plus_one: bool,
    shrunk: Shrunk,
    upload: Tensor,
    table: AdapterTable,
    module: int,
) -> Tensor:
    """See runtime.engine.kernels.adapter_norm.add_rms_norm_adapted, of which this is the part behind the shrink."""
    num_tokens, width = y.shape
    if y.stride(1) != 1 or not residual.is_contiguous():
        raise ValueError(f"a norm needs contiguous rows, strides are {y.stride()} and {residual.stride()}")
    out = y.new_empty(y.shape)
    if num_tokens:
        adapted_norm_kernel[(num_tokens,)](
            y,
            residual,
            weight,
            out,
            upload,
            table.places,
            table.memory,
            shrunk.parts,
            y.stride(0),
            width,
            eps,
            module,
            table.places.shape[1],
            shrunk.num_splits,
            num_tokens,
            PLUS_ONE=plus_one,
            SPLITS=triton.next_power_of_2(shrunk.num_splits),
            BLOCK=triton.next_power_of_2(width),
            BLOCK_R=BLOCK_R,
            PDL=pdl.overlaps(y),
            num_warps=_NUM_WARPS,
            **pdl.options(y),
        )
    return out
