"""Computes x · Wᵀ with W in int8 or e4m3 and one scale per row. int8 is bitsandbytes' row-wise format with threshold 0.

One path serves every number of rows: activations are quantised per token, by the kernel that computes them or here, and
8 bits are multiplied by 8. Weight-only paths for few rows were measured and rejected, because converting the weights to
bf16 costs more than quantising a few rows (docs/benchmarks/linear.md).
"""

from torch import Tensor

from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.quantized_rows import QuantizedRows, quantize_rows
from runtime.engine.kernels.scratch import Scratch

GATED_ROWS = 32  # up to which `linear_8bit` applies a gate in the launch of the product


def linear_8bit(
    x: Tensor | QuantizedRows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] of `x` [..., K] and `weight` int8 or float8_e4m3fn [N, K] with `scale` [N] float32.

    Row n of the weight stands for weight[n] · scale[n], and scale is absmax / 127 or absmax / 448. Codes in `x` must have the weight's type.
    With `gate`, the rows of the weight are those of gate, then those of up, and the result is act(gate) × up [..., N/2].
    """
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, weight.dtype)
    if out is None:
        leading = (len(rows.codes),) if isinstance(x, QuantizedRows) else x.shape[:-1]
        out = scale.new_empty((*leading, weight.shape[0] // (1 if gate is None else 2)), dtype=rows.dtype)
    if weight.is_cuda:
        from runtime.engine.kernels.gpu import linear8

        linear8.linear_8bit(rows, weight, scale, bias, gate, out, scratch)
    else:
        linear_8bit_torch(rows, weight, scale, bias, gate, out)
    return out


def linear_8bit_torch(
    x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None, gate: Activation | None, out: Tensor
) -> None:
    """Torch twin of the launches. Sums in float64 are exact; in float32, sums of integers are exact only up to K = 1040."""
    sums = (x.codes.double() @ weight.double().t()).float()
    y = sums * (x.scale[:, None] * scale)
    if bias is not None:
        y += bias.float()
    if gate is None:
        out.view(y.shape).copy_(y)
    else:
        act_mul(y.to(x.dtype), gate, out.view(len(y), -1))
