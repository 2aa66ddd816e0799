"""Computes x · Wᵀ with W in int8 or e4m3 and one scale per row. int8 is bitsandbytes' row-wise format with threshold 0.

One path serves every number of rows: activations are quantised per token, by the kernel that computes them or here, and
8 bits are multiplied by 8. Weight-only paths for few rows were measured and rejected, because converting the weights to
bf16 costs more than quantising a few rows (docs/benchmarks/linear.md).
"""

from torch import Tensor

from runtime.engine.kernels.quantized_rows import QuantizedRows, quantize_rows
from runtime.engine.kernels.scratch import Scratch


def linear_8bit(
    x: Tensor | QuantizedRows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] of `x` [..., K] and `weight` int8 or float8_e4m3fn [N, K] with `scale` [N] float32.

    Row n of the weight stands for weight[n] · scale[n], and scale is absmax / 127 or absmax / 448. Codes in `x` must have the weight's type.
    """
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.dtype)
    if out is None:
        leading = (len(rows.codes),) if isinstance(x, QuantizedRows) else x.shape[:-1]
        out = scale.new_empty((*leading, weight.shape[0]), dtype=rows.dtype)
    if weight.is_cuda:
        from runtime.engine.kernels.gpu import linear8

        linear8.linear_8bit(rows, weight, scale, bias, out, scratch)
    else:
        linear_8bit_torch(rows, weight, scale, bias, out)
    return out


def linear_8bit_torch(x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Torch twin of the launches. Sums in float64 are exact; in float32, sums of integers are exact only up to K = 1040."""
    sums = (x.codes.double() @ weight.double().t()).float()
    y = sums * (x.scale[:, None] * scale)
    out.view(y.shape).copy_(y if bias is None else y + bias.float())
