"""The fp8 linear on a GPU: weights widened in registers at few rows, torch's fp8 product at many."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.gpu import linear16, pdl
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 64  # Above, arithmetic limits the product, and multiplying in fp8 is faster.
_COLUMNS = 256
_MULTIPLE = 16  # of the sizes that torch's product takes
_OLDEST = (9, 0)  # the first compute capability with the instructions that widen e4m3


@triton.jit
def _quantize_kernel(x_ptr, q_ptr, scale_ptr, x_stride, K, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.begin(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), axis=0)
    factor = tl.where(absmax > 0, 448.0 / tl.where(absmax > 0, absmax, 1.0), 0.0)
    tl.store(q_ptr + row * K + cols, (x * factor).to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + row, absmax / 448.0)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.linear_fp8.linear_fp8."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 0:
        return
    if rows.shape[0] <= MAX_ROWS and serves_few(rows, weight):
        num_outputs = weight.shape[0] // (1 if gate is None else 2)
        how = tiling(rows.shape[0], num_outputs, rows.shape[1], gate is not None)
        linear16.launch(rows, weight.view(torch.uint8), scale, bias, gate, out, scratch, *how)
        return
    y = _products(rows, weight, scale)
    if bias is not None:
        y += bias
    if gate is None:
        out.view(y.shape).copy_(y)
    else:
        act_mul(y, gate, out.view(y.shape[0], -1))


def serves_few(rows: Tensor, weight: Tensor) -> bool:
    """Return whether the kernel that widens weights supports these operands."""
    return (
        rows.shape[1] % _COLUMNS == 0
        and rows.stride(1) == 1
        and weight.is_contiguous()
        and (not rows.is_cuda or _capability(rows.device) >= _OLDEST)
    )


def tiling(num_rows: int, num_outputs: int, in_features: int, gated: bool) -> tuple[int, int, int, int, bool, int, int]:
    """Return (BLOCK_M, BLOCK_N, BLOCK_K, splits of K, early, warps, stages)."""
    block_m = max(16, triton.next_power_of_2(num_rows))
    if gated:
        return block_m, 64, 128, 1, False, 4, 4
    # At most two programs per multiprocessor, and a power of two so that parts have equal size.
    splits = 1
    while triton.cdiv(num_outputs, 64) * splits * 2 <= 4 * 80 and in_features // (splits * 2) >= 1024:
        splits *= 2
    return block_m, 64, 256 if block_m <= 32 else 128, splits, False, 4, 4


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the e4m3 codes [M, K] and float32 scales [M, 1] = absmax / 448 of `rows`."""
    num_rows, in_features = rows.shape
    codes = torch.empty((num_rows, in_features), dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty((num_rows, 1), dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(in_features)
    _quantize_kernel[(num_rows,)](
        rows,
        codes,
        scale,
        rows.stride(0),
        in_features,
        BLOCK=block,
        PDL=pdl.overlaps(rows),
        num_warps=4 if block <= 4096 else 8,
        **pdl.options(rows),
    )
    return codes, scale


def _products(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return rows · Wᵀ [M, N]. torch multiplies rows of e4m3 only into bfloat16; for other types the weight is dequantised."""
    if rows.dtype is torch.bfloat16 and weight.shape[0] % _MULTIPLE == 0 and weight.shape[1] % _MULTIPLE == 0:
        codes, row_scale = quantize_rows(rows)
        return torch._scaled_mm(codes, weight.t(), row_scale, scale[None], out_dtype=rows.dtype, use_fast_accum=True)
    return functional.linear(rows, (weight.float() * scale[:, None]).to(rows.dtype))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
