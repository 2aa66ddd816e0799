"""RMSNorm and residual + RMSNorm in Triton, with one program per row and the row held in registers. The result may be quantised."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.quantized_rows import codes_of_row, num_warps_for
from runtime.engine.kernels.quantized_rows import QuantizedRows, largest


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    x_stride,
    out_stride,
    width,
    eps,
    ADD: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    # Eight columns a thread for codes too: with 16, the compiler moves the row between threads through shared memory.
    cols = tl.max_contiguous(tl.arange(0, BLOCK), 8)
    mask = cols < width
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    pdl.wait(PDL)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * width + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + row * width + cols, x, mask=mask)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + eps)
    wide = wide * scale
    if PLUS_ONE:
        y = wide * (1.0 + weight.to(tl.float32))
    else:
        y = weight.to(tl.float32) * wide.to(x.dtype).to(tl.float32)
    if LARGEST > 0:
        # Round where a separate launch would round.
        codes, scale = codes_of_row(y.to(x.dtype).to(tl.float32), out_ptr, LARGEST)
        tl.store(out_ptr + row * out_stride + cols, codes, mask=mask)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(out_ptr + row * out_stride + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool, out: Tensor | QuantizedRows
) -> None:
    if residual is not None and not residual.is_contiguous():
        raise ValueError(
            f"add_rms_norm: residual of shape {tuple(residual.shape)} must be contiguous, strides are {residual.stride()}"
        )
    width = x.shape[-1]
    rows = x.reshape(-1, width) if x.is_contiguous() else x.view(-1, width)
    if rows.shape[0] == 0:
        return
    block = triton.next_power_of_2(width)
    if isinstance(out, QuantizedRows):
        out_rows, scale, most = out.codes, out.scale, largest(out.codes.dtype)
    else:
        out_rows, scale, most = out.view(-1, width), weight, 0.0
    _norm_kernel[(rows.shape[0],)](
        rows,
        residual if residual is not None else rows,
        weight,
        out_rows,
        scale,
        rows.stride(0),
        out_rows.stride(0),
        width,
        eps,
        ADD=residual is not None,
        PLUS_ONE=plus_one,
        LARGEST=most,
        BLOCK=block,
        PDL=pdl.overlaps(rows),
        num_warps=num_warps_for(block),
        **pdl.options(rows),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool, out: Tensor | QuantizedRows) -> None:
    """See runtime.engine.kernels.norm.rms_norm and rms_norm_quantized."""
    _launch(x, None, weight, eps, plus_one, out)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool, out: Tensor | QuantizedRows
) -> None:
    """See runtime.engine.kernels.norm.add_rms_norm and add_rms_norm_quantized. `residual` must be contiguous."""
    _launch(x, residual, weight, eps, plus_one, out)
