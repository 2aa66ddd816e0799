"""RMSNorm, alone and after a residual addition, with the result in x's type or as codes of 8 bits.

Rounding follows transformers. Llama-like norms round the normalised row to its own type and then multiply by the
weight. Gemma-like norms (`plus_one`) multiply by `1 + weight` in float32 and round once.
"""

import torch
from torch import Tensor

from runtime.engine.kernels.quantized_rows import QuantizedRows, quantize_rows_torch


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None) -> Tensor:
    """Normalise the last dimension of `x` [..., H] by its root mean square and scale it by `weight` [H].

    Rows must be contiguous.
    """
    if out is None:
        out = torch.empty_like(x)
    if x.is_cuda:
        from runtime.engine.kernels.gpu import norm

        norm.rms_norm(x, weight, eps, plus_one, out)
    else:
        rms_norm_torch(x, weight, eps, plus_one, out)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` in place and normalise the sum. Returns (normed, residual), both [..., H].

    This is one launch on a GPU.
    """
    if out is None:
        out = torch.empty_like(x)
    if x.is_cuda:
        from runtime.engine.kernels.gpu import norm

        norm.add_rms_norm(x, residual, weight, eps, plus_one, out)
    else:
        add_rms_norm_torch(x, residual, weight, eps, plus_one, out)
    return out, residual


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, codes: torch.dtype, plus_one: bool = False
) -> QuantizedRows:
    """Normalise the rows of `x` [..., H] and quantise the result, rounded to x's type, to `codes`. This is one launch on a GPU."""
    out = QuantizedRows.empty(x, x.shape[-1], codes)
    if x.is_cuda:
        from runtime.engine.kernels.gpu import norm

        norm.rms_norm(x, weight, eps, plus_one, out)
    else:
        quantize_rows_torch(rms_norm(x, weight, eps, plus_one), out)
    return out


def add_rms_norm_quantized(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype, plus_one: bool = False
) -> tuple[QuantizedRows, Tensor]:
    """Add `x` to `residual` in place, normalise the sum and quantise the result. Returns (normed, residual).

    This is one launch on a GPU.
    """
    out = QuantizedRows.empty(x, x.shape[-1], codes)
    if x.is_cuda:
        from runtime.engine.kernels.gpu import norm

        norm.add_rms_norm(x, residual, weight, eps, plus_one, out)
    else:
        quantize_rows_torch(add_rms_norm(x, residual, weight, eps, plus_one)[0], out)
    return out, residual


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, plus_one: bool, out: Tensor) -> None:
    """Torch twin of the Triton launch."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        out.copy_(wide * (1.0 + weight.float()))
    else:
        out.copy_(weight * wide.to(x.dtype))


def add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool, out: Tensor) -> None:
    """Torch twin of the Triton launch."""
    residual.add_(x)
    rms_norm_torch(residual, weight, eps, plus_one, out)
