"""Computes x · Wᵀ with W in int8 and one scale per row: bitsandbytes' row-wise int8 with threshold 0.

One path serves every number of rows: activations are quantised per token, and integers are multiplied by integers. A
weight-only path for few rows was measured and rejected, because converting int8 to bf16 costs more than quantising a
few rows (docs/benchmarks/linear.md).
"""

import torch
from torch import Tensor

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
