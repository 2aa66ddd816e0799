"""Linear layers on a CPU: oneDNN's matrix product, which beats the BLAS behind torch's `linear` at every batch size.

Measured on an AMD EPYC with AVX-512: 1.2 to 2.7 times as fast for 1 to 32 rows over weights as they lie, and 1.3 to 1.5 times more for 4 to 32 rows
over weights in oneDNN's order. Quantised weights are unpacked at every call (4 bit: by bitsandbytes' own routine, so in its layout) and multiplied by
unrounded activations. Knows matrices; nothing of layers or models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.scratch import Scratch

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class HostLinear:
    """`weight` [N, K] in the activations' type, in rows or in oneDNN's order."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return multiply(x, self.weight, self.bias)


class HostLinear4:
    """`weight` uint8 [N, K/2] and `absmax` float32 [N, K/64] in bitsandbytes' layout."""

    def __init__(self, weight: Tensor, absmax: Tensor, codebook: str, bias: Tensor | None = None) -> None:
        # imported here: an engine that serves no such model on a CPU starts without it
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        self._unpack = dequantize_4bit
        self._weight = weight.view(-1, 1)
        self._bias = bias
        code = get_4bit_type(codebook, device="cpu")
        shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
        self._states = {
            dtype: QuantState(absmax.view(-1), shape=shape, code=code, blocksize=_BLOCK, quant_type=codebook, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return multiply(x, self._unpack(self._weight, self._states[x.dtype]), self._bias)


@dataclass(frozen=True, slots=True)
class HostLinear8:
    """`weight` int8 [N, K], `scale` float32 [N]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        y = multiply(x, self.weight.to(x.dtype), None) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] · weightᵀ (+ bias)."""
    if weight.is_mkldnn or (x.dtype is torch.float32 and torch.backends.mkldnn.is_available()):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return functional.linear(x, weight, bias)
