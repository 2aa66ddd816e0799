"""Provides linear layers over views of the weights image: unquantised, 4-bit, int8 and fp8."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.model_key import Quantization
from runtime.checkpoint.quantized_shapes import GGUF_BLOCK, KEPT_BLOCKS
from runtime.engine.kernels.codebooks import Codebook
from runtime.engine.kernels.linear4 import linear_4bit, warm
from runtime.engine.kernels.linear8 import linear_8bit
from runtime.engine.kernels.linear16 import linear_16bit, serves
from runtime.engine.kernels.quantized_rows import QuantizedRows
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.cpu.linear import CpuLinear, CpuLinear4, CpuLinear8, CpuLinearFp8, CpuLinearGguf
from runtime.engine.model.run.adapters import AdapterSite, StepPort


class Linear(Protocol):
    """Maps x [..., K] to x · weightᵀ (+ bias) [..., N]. With `scratch`, GPU kernels allocate no workspace."""

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """An unquantised layer: `weight` [N, K] in the dtype of the activations."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        if serves(x, self.weight):
            return linear_16bit(x, self.weight, self.bias, scratch=scratch)
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Linear4:
    """A 4-bit layer: `weight` uint8 [N, P/2] and `absmax`, float32 [N, P/64] or float16 [N, P/32], in the kernels' layout."""

    weight: Tensor
    absmax: Tensor
    codebook: Codebook
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return linear_4bit(x, self.weight, self.absmax, self.codebook, self.bias, scratch=scratch)


@dataclass(frozen=True, slots=True)
class Linear8:
    """An 8-bit layer: `weight` [N, K], int8 as bitsandbytes quantises rows or float8_e4m3fn, and `scale` float32 [N] of its rows.

    Input that is quantised already must be codes of the weight's type.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor | QuantizedRows, scratch: Scratch | None = None) -> Tensor:
        return linear_8bit(x, self.weight, self.scale, self.bias, scratch=scratch)


@dataclass(frozen=True, slots=True)
class SplitLinear:
    """Several layers over the same input, whose weights are stored in different formats. Their outputs lie end to end."""

    parts: tuple[Linear, ...]

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return torch.cat([part(x, scratch) for part in self.parts], -1)


class LinearModule(nn.Module):
    """Replaces an nn.Linear in Hugging Face's model code by a Linear. With `site`, the adapters in `port` are added to its output."""

    def __init__(
        self,
        linear: Linear,
        in_features: int,
        out_features: int,
        port: StepPort | None = None,
        site: AdapterSite | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.in_features = in_features
        self.out_features = out_features
        self._port = port
        self._site = site

    def forward(self, x: Tensor) -> Tensor:
        adapters = None if self._port is None else self._port.adapters
        if adapters is None or self._site is None:
            return self.linear(x)
        rows = x.reshape(-1, self.in_features)
        return adapters.around(self._site, rows, lambda: self.linear(rows), None).view(*x.shape[:-1], self.out_features)


def make_linear(name: str, views: dict[str, Tensor], quantization: Quantization) -> Linear:
    """Return the linear layer `name` over its views. Its kind follows from which tensors exist and their device."""
    weight, bias = views[f"{name}.weight"], views.get(f"{name}.bias")
    on_host = weight.device.type == "cpu"
    if (absmax := views.get(f"{name}.absmax")) is not None:
        codebook: Codebook = "fp4" if quantization is Quantization.FP4 else "nf4"
        warm(weight.device)
        return CpuLinear4(weight, absmax, codebook, bias) if on_host else Linear4(weight, absmax, codebook, bias)
    for kept in KEPT_BLOCKS.values():
        if (scales := views.get(f"{name}.{kept}")) is not None:
            warm(weight.device, GGUF_BLOCK)
            return CpuLinearGguf(weight, scales, kept, bias) if on_host else Linear4(weight, scales, kept, bias)
    scale = views.get(f"{name}.scale")
    if scale is not None and weight.dtype is torch.int8:
        return CpuLinear8(weight, scale, bias) if on_host else Linear8(weight, scale, bias)
    if scale is not None and weight.dtype is torch.float8_e4m3fn:
        return CpuLinearFp8(weight, scale, bias) if on_host else Linear8(weight, scale, bias)
    return CpuLinear(weight, bias) if on_host else PlainLinear(weight, bias)
