"""Quantises rows to 8 bits in Triton, with one program per row."""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.quantized_rows import QuantizedRows, largest


@triton.jit
def codes_of_row(x, codes_ptr, LARGEST: tl.constexpr):
    """Return the codes of a row, of the type at `codes_ptr`, and its scale. `x` is float32 and 0 past the end of the row."""
    absmax = tl.max(tl.abs(x), axis=0)
    codes = x * tl.where(absmax > 0, LARGEST / tl.where(absmax > 0, absmax, 1.0), 0.0)
    if codes_ptr.dtype.element_ty == tl.int8:
        # Adding and subtracting 1.5 · 2^23 rounds to the nearest integer, halves to even.
        codes = (codes + 12582912.0) - 12582912.0
    return codes.to(codes_ptr.dtype.element_ty), absmax / LARGEST


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, x_stride, K, LARGEST: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    pdl.begin(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    codes, scale = codes_of_row(x, codes_ptr, LARGEST)
    tl.store(codes_ptr + row * K + cols, codes, mask=mask)
    tl.store(scale_ptr + row, scale)


def num_warps_for(block: int) -> int:
    """Return the warps of a program that holds `block` columns of a row in registers."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def quantize_rows(x: Tensor, out: QuantizedRows) -> None:
    """See runtime.engine.kernels.quantized_rows.quantize_rows."""
    num_rows, in_features = out.codes.shape
    if num_rows == 0:
        return
    rows = x.reshape(-1, in_features)
    block = triton.next_power_of_2(in_features)
    _quantize_kernel[(num_rows,)](
        rows,
        out.codes,
        out.scale,
        rows.stride(0),
        in_features,
        LARGEST=largest(out.codes.dtype),
        BLOCK=block,
        PDL=pdl.overlaps(rows),
        num_warps=num_warps_for(block),
        **pdl.options(rows),
    )
