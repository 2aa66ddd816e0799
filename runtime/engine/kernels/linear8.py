"""Computes x · Wᵀ with W in int8 or e4m3 and one scale per row. int8 is bitsandbytes' row-wise format with threshold 0.

One path serves every number of rows: activations are quantised per token, and the matrix unit multiplies 8 bits by 8.
Weight-only paths for few rows were measured and rejected, because converting the weights to bf16 costs more than
quantising a few rows (docs/benchmarks/linear.md).
"""

import torch
from torch import Tensor

from runtime.checkpoint.fp8 import quantize_rows
from runtime.engine.kernels.scratch import Scratch


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] of `x` [..., K] and `weight` int8 [N, K] with `scale` [N] float32 (absmax / 127).

    Row n of the weight stands for weight[n] · scale[n].
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if x.is_cuda:
        from runtime.engine.kernels.gpu import linear8

        linear8.linear_int8(x, weight, scale, bias, out, scratch)
    else:
        linear_int8_torch(x, weight, scale, bias, out)
    return out


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] of `x` [..., K] and `weight` float8_e4m3fn [N, K] with `scale` [N] float32 (absmax / 448).

    Row n of the weight stands for weight[n] · scale[n].
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if x.is_cuda:
        from runtime.engine.kernels.gpu import linear8

        linear8.linear_fp8(x, weight, scale, bias, out, scratch)
    else:
        linear_fp8_torch(x, weight, scale, bias, out)
    return out


def linear_fp8_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Torch twin of the launches, which quantise the activations too."""
    codes, x_scale = quantize_rows(x)
    y = (codes.float() @ weight.float().t()) * (x_scale * scale)
    out.copy_(y if bias is None else y + bias.float())


def linear_int8_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Torch twin of the Triton launch, which quantises the activations too.

    Sums of integers are exact in float64. In float32 they are exact only up to K = 1040.
    """
    quantized, x_scale = quantize_rows_torch(x)
    sums = (quantized.double() @ weight.t().double()).float()
    y = sums * (x_scale * scale)
    out.copy_(y if bias is None else y + bias.float())


def quantize_rows_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row of `x` [..., K] to int8. Returns the codes and the scales [..., 1] = absmax / 127."""
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True)
    factor = torch.where(absmax > 0, 127.0 / absmax, torch.zeros_like(absmax))
    return torch.round(wide * factor).to(torch.int8), absmax / 127.0
