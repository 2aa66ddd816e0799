"""Computes x · Wᵀ with W in e4m3 and one float32 scale per row.

At few rows, memory bandwidth is the limit: weights are widened to the type of the activations. At many rows, arithmetic
is the limit: activations are quantised per token to e4m3, and the matrix unit multiplies fp8 by fp8.
"""

from torch import Tensor

from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.scratch import Scratch


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] of `x` [..., K] and `weight` float8_e4m3fn [N, K] with `scale` [N] float32.

    Row n of the weight stands for weight[n] · scale[n]. With `gate`, the rows of the weight are those of gate, then those
    of up, and the result is act(gate) × up [..., N/2].
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], weight.shape[0] // (1 if gate is None else 2)))
    if x.is_cuda:
        from runtime.engine.kernels.gpu import linear_fp8 as gpu

        gpu.linear_fp8(x, weight, scale, bias, gate, out, scratch)
    else:
        linear_fp8_torch(x, weight, scale, bias, gate, out)
    return out


def linear_fp8_torch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, gate: Activation | None, out: Tensor
) -> None:
    """Torch twin of the launch at few rows: the activations are not rounded."""
    y = (x.float() @ weight.float().t()) * scale
    y = (y if bias is None else y + bias.float()).to(x.dtype)
    if gate is None:
        out.copy_(y)
    else:
        act_mul(y, gate, out)
