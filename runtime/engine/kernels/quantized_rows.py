"""Quantises rows of activations to 8 bits, each with a scale of its own: the input of the linears over 8-bit weights.

The kernels that compute such an input quantise it themselves where one program holds a whole row (`norm.py`, `activation.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.checkpoint import fp8

LARGEST_INT8 = 127.0


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as codes. Row m stands for codes[m] · scale[m].

    Attributes:
        codes: [M, K] int8 or float8_e4m3fn, contiguous.
        scale: [M] float32, absmax / 127 or absmax / 448.
        dtype: the type of the activations, and so of the products.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @staticmethod
    def empty(x: Tensor, in_features: int, codes: torch.dtype) -> "QuantizedRows":
        """Allocate codes for as many rows as `x` [..., any] has, in x's dtype and on x's device."""
        num_rows = x.numel() // x.shape[-1]
        return QuantizedRows(
            torch.empty((num_rows, in_features), dtype=codes, device=x.device),
            torch.empty(num_rows, dtype=torch.float32, device=x.device),
            x.dtype,
        )


def largest(codes: torch.dtype) -> float:
    """Return the code that the largest magnitude of a row gets."""
    return LARGEST_INT8 if codes is torch.int8 else fp8.LARGEST


def quantize_rows(x: Tensor, codes: torch.dtype) -> QuantizedRows:
    """Quantise each row of `x` [..., K]. `codes`: torch.int8 or torch.float8_e4m3fn."""
    out = QuantizedRows.empty(x, x.shape[-1], codes)
    if x.is_cuda:
        from runtime.engine.kernels.gpu import quantized_rows

        quantized_rows.quantize_rows(x, out)
    else:
        quantize_rows_torch(x, out)
    return out


def quantize_rows_torch(x: Tensor, out: QuantizedRows) -> None:
    """Torch twin of the Triton launch. A row of zeros has the scale 0."""
    rows = x.reshape(-1, x.shape[-1])
    if out.codes.dtype is torch.int8:
        wide = rows.float()
        absmax = wide.abs().amax(-1, keepdim=True)
        factor = torch.where(absmax > 0, LARGEST_INT8 / absmax, torch.zeros_like(absmax))
        out.codes.copy_(torch.round(wide * factor))
        out.scale.copy_((absmax / LARGEST_INT8).view(-1))
    else:
        codes, scale = fp8.quantize_rows(rows)
        out.codes.copy_(codes)
        out.scale.copy_(scale.view(-1))
