"""Linear layers on a CPU through oneDNN's matrix product, which is faster than the BLAS behind torch's `linear` at
every batch size.

Measured on an AMD EPYC with AVX-512: 1.2 to 2.7 times as fast for 1 to 32 rows over row-major weights, and another
1.3 to 1.5 times for 4 to 32 rows over weights in oneDNN's layout. Quantised weights are dequantised at every call, a
few megabytes at a time (4-bit codes by bitsandbytes' own routine, and so in its layout), and multiplied by
activations that are not rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from runtime.checkpoint.quantized_shapes import GGUF_BLOCK
from runtime.engine.kernels.codebooks import Codebook, codebook_values
from runtime.engine.kernels.scratch import Scratch

_BLOCK = 64
_HALF_BLOCK = GGUF_BLOCK // 2
# Elements that are unpacked at a time. A larger part would leave the cache and get fresh pages from the OS at every call.
_PART_ELEMENTS = 1 << 21
# Up to this number of rows torch's own int8 product is faster than unpacking in bf16: 3 times as fast at one row.
_ROWS_OF_INT8 = 8
# torch's int8 product reads this many columns at a time, and past the end of a row that is not a multiple.
_COLUMNS_OF_INT8 = 32


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A linear layer with `weight` [N, K] in the activations' type, row-major or in oneDNN's layout."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return multiply(x, self.weight, self.bias)


class CpuLinear4:
    """A linear layer with `weight` uint8 [N, K/2] and `absmax` float32 [N, K/64] in bitsandbytes' layout."""

    def __init__(self, weight: Tensor, absmax: Tensor, codebook: str, bias: Tensor | None = None) -> None:
        # Imported here because an engine on a GPU never needs it.
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        self._shape = torch.Size((weight.shape[0], 2 * weight.shape[1]))
        self._weight = weight
        self._absmax = absmax.view(weight.shape[0], -1)
        self._bias = bias
        self._state = partial(
            QuantState, code=get_4bit_type(codebook, device="cpu"), blocksize=_BLOCK, quant_type=codebook
        )
        self._dequantize = dequantize_4bit

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return _multiply_unpacked(x, self._shape, self._unpack, self._bias)

    def _unpack(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        shape = torch.Size((last - first, self._shape[1]))
        state = self._state(self._absmax[first:last].view(-1), shape=shape, dtype=dtype)
        unpacked: Tensor = self._dequantize(self._weight[first:last].view(-1, 1), state)
        return unpacked


class CpuLinearGguf:
    """A linear layer with `weight` uint8 [N, K/2] and `scales` float16 [N, K/32] as GGUF's blocks of 32 elements hold them."""

    def __init__(self, weight: Tensor, scales: Tensor, codebook: Codebook, bias: Tensor | None = None) -> None:
        self._weight = weight.unflatten(1, (-1, _HALF_BLOCK))
        self._scales = scales
        self._bias = bias
        # Integers in the order of their codes need no table.
        self._table = None if codebook == "q4_0" else torch.tensor(codebook_values(codebook))

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        shape = torch.Size((self._weight.shape[0], self._scales.shape[1] * GGUF_BLOCK))
        return _multiply_unpacked(x, shape, self._unpack, self._bias)

    def _unpack(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        codes = self._weight[first:last]
        wide = torch.empty((*codes.shape[:2], 2, _HALF_BLOCK))
        for half, part in enumerate((codes & 15, codes >> 4)):
            if self._table is None:
                torch.sub(part, 8.0, out=wide[:, :, half])
            else:
                wide[:, :, half] = self._table[part.int()]
        wide.mul_(self._scales[first:last, :, None, None].float())
        return wide.view(last - first, -1).to(dtype)


@dataclass(frozen=True, slots=True)
class CpuLinear8:
    """A linear layer with `weight` int8 [N, K] and `scale` float32 [N]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        scale = self.scale.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype is torch.bfloat16 and rows.shape[0] <= _ROWS_OF_INT8 and rows.shape[1] % _COLUMNS_OF_INT8 == 0:
            y: Tensor = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, scale).view(
                *x.shape[:-1], len(scale)
            )
        else:
            y = (
                _multiply_unpacked(
                    x, self.weight.shape, lambda first, last, dtype: self.weight[first:last].to(dtype), None
                )
                * scale
            )
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, slots=True)
class CpuLinearFp8:
    """A linear layer with `weight` float8_e4m3fn [N, K] and `scale` float32 [N]."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        y = _multiply_unpacked(
            x, self.weight.shape, lambda first, last, dtype: self.weight[first:last].to(dtype), None
        ) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def _multiply_unpacked(
    x: Tensor, shape: torch.Size, unpack: Callable[[int, int, torch.dtype], Tensor], bias: Tensor | None
) -> Tensor:
    """Return x [..., K] · Wᵀ (+ bias) for a weight [N, K] whose rows `unpack(first, last, dtype)` returns."""
    num_rows = shape[0]
    num_parts = -(-shape.numel() // _PART_ELEMENTS)
    if num_parts <= 1:
        return multiply(x, unpack(0, num_rows, x.dtype), bias)
    step = -(-num_rows // num_parts)
    y = x.new_empty((*x.shape[:-1], num_rows))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        y[..., first:last] = multiply(x, unpack(first, last, x.dtype), None if bias is None else bias[first:last])
    return y


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [..., K] · Wᵀ (+ bias)."""
    if weight.is_mkldnn or (x.dtype is torch.float32 and torch.backends.mkldnn.is_available()):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return functional.linear(x, weight, bias)
