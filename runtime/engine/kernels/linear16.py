"""Computes x · Wᵀ with a 16-bit W at few rows, where memory bandwidth is the limit.

At few rows a matrix product streams weights, and a library's product loses time at its beginning and end. This kernel
fetches weights while the kernels before it still run (`gpu/pdl.py`), splits products that would leave multiprocessors
idle, and applies the gate of an MLP to the sums in registers.
"""

import torch
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 32  # Above, arithmetic limits the product and cuBLAS is as fast.
MAX_ROWS_OF_LARGE = 64  # for weights with at least LARGE_OUTPUTS outputs or LARGE_COLUMNS columns
LARGE_OUTPUTS = 16384
LARGE_COLUMNS = 8192
LEAST_COLUMNS = 512  # of K; and a multiple of it


def serves(x: Tensor, weight: Tensor) -> bool:
    """Return whether `linear_16bit` supports these operands: a GPU, 16-bit types, few rows, a wide K."""
    if not x.is_cuda or x.element_size() != 2 or weight.dtype != x.dtype or x.shape[-1] % LEAST_COLUMNS:
        return False
    large = weight.shape[0] >= LARGE_OUTPUTS or weight.shape[1] >= LARGE_COLUMNS
    return x.numel() // x.shape[-1] <= (MAX_ROWS_OF_LARGE if large else MAX_ROWS)


def linear_16bit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] of `x` [..., K], `weight` [N, K] and `bias` [N].

    With `gate`, the rows of the weight are those of gate, then those of up, and the result is act(gate) × up [..., N/2].
    On a GPU the operands must be ones that `serves` accepts.
    """
    num_outputs = weight.shape[0] // (1 if gate is None else 2)
    if out is None:
        out = x.new_empty((*x.shape[:-1], num_outputs))
    if x.is_cuda:
        from runtime.engine.kernels.gpu import linear16

        linear16.linear_16bit(x, weight, bias, gate, out, scratch)
    else:
        linear_16bit_torch(x, weight, bias, gate, out)
    return out


def linear_16bit_torch(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Activation | None, out: Tensor) -> None:
    """Torch twin of the Triton launch."""
    y = functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(
        torch.promote_types(x.dtype, weight.dtype)
    )
    if gate is None:
        out.copy_(y)
    else:
        act_mul(y, gate, out)
