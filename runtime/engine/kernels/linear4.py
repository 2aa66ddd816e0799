"""Computes x · Wᵀ with W in 4 bits (NF4 or FP4 with one float32 absmax per 64 elements, or GGUF's Q4_0 or IQ4_NL with one
float16 scale per 32), in the layout of `checkpoint/layout_4bit.py`.

The path on a GPU depends on the rows M of x. Up to a few hundred rows, fused kernels dequantise the weights on their
way to the matrix unit (`gpu/linear4.py` chooses between them). Above that, the weight is dequantised into scratch
memory and multiplied by cuBLAS, because arithmetic then costs more than the extra bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from runtime.checkpoint.layout_4bit import codes_4bit
from runtime.checkpoint.quantized_shapes import BLOCK, padded_width
from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.codebooks import Codebook, codebook_values
from runtime.engine.kernels.scratch import Scratch


def linear_4bit(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None = None,
    gate: Activation | None = None,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """Return x · Wᵀ + bias [..., N] in the type of `x` [..., K], for a 4-bit weight and `bias` [N].

    With `gate`, the rows of the weight are those of gate, then those of up, and the result is act(gate) × up [..., N/2].
    `weight` uint8 [N, P/2] and `absmax` float32 [N, P/64] are as `kernel_layout_4bit` returns them, or with float16
    scales [N, P/32] as `kernel_layout_gguf` does. If K is not a multiple of 64, those of bitsandbytes are 1-D, and the
    weight is dequantised at every call. With `out` and `scratch`, nothing is allocated for up to 128 rows, nor for more
    rows if `staging` holds a part of the weight in x's type.
    """
    if out is None:
        out = x.new_empty((*x.shape[:-1], num_rows_4bit(weight, x.shape[-1]) // (1 if gate is None else 2)))
    if x.is_cuda and weight.dim() == 2:
        from runtime.engine.kernels.gpu import linear4

        linear4.linear_4bit(x, weight, absmax, codebook, bias, gate, out, scratch)
    else:
        linear_4bit_torch(x, weight, absmax, codebook, bias, gate, out)
    return out


def warm(device: torch.device, block: int = BLOCK) -> None:
    """Prepare the GPU's kernels for blocks of this many elements before the first call. Does nothing on a CPU."""
    if device.type == "cuda":
        from runtime.engine.kernels.gpu import linear4

        linear4.warm(device, block)


def num_rows_4bit(weight: Tensor, in_features: int) -> int:
    """Return N of a weight in either layout."""
    return weight.shape[0] if weight.dim() == 2 else weight.numel() * 2 // in_features


def linear_4bit_torch(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
) -> None:
    """Torch twin of the GPU's kernels: dequantises, then multiplies."""
    y = functional.linear(x, dequantize_4bit_torch(weight, absmax, codebook, x.shape[-1], x.dtype), bias)
    if gate is None:
        out.copy_(y)
    else:
        act_mul(y, gate, out)


def dequantize_4bit_torch(
    weight: Tensor, absmax: Tensor, codebook: Codebook, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight [N, K] in `dtype`, rounded once from float32, as bitsandbytes does."""
    values = torch.tensor(codebook_values(codebook), dtype=torch.float32, device=weight.device)
    if weight.dim() == 2:
        wide = values[codes_4bit(weight, in_features).int()]
        block = padded_width(in_features) // absmax.shape[1]
        scales = absmax[:, : in_features // block, None].float()
        return (wide.view(wide.shape[0], -1, block) * scales).view(wide.shape).to(dtype)
    codes = torch.stack((weight >> 4, weight & 15), dim=-1).reshape(-1)
    wide = values[codes.int()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return wide.view(-1, in_features).to(dtype)
