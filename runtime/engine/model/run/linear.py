"""Linear layers over views of the weights image: plain, 4-bit and int8 behind one call."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.model_key import Quantization
from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.linear4 import linear_4bit, warm
from runtime.engine.kernels.linear8 import linear_int8
from runtime.engine.kernels.linear16 import linear_16bit, serves
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.cpu.linear import CpuLinear, CpuLinear4, CpuLinear8


class Linear(Protocol):
    """x [..., K] → x · weightᵀ (+ bias) [..., N]. With `scratch` a kernel need not allocate (GPU)."""

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """`weight` [N, K] in the activations' type."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        if serves(x, self.weight):
            return linear_16bit(x, self.weight, self.bias, scratch=scratch)
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Linear4:
    """`weight` uint8 [N, P/2], `absmax` float32 [N, P/64] in the kernels' layout (kernels.layout)."""

    weight: Tensor
    absmax: Tensor
    codebook: Literal["nf4", "fp4"]
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return linear_4bit(x, self.weight, self.absmax, self.codebook, self.bias, scratch=scratch)


@dataclass(frozen=True, slots=True)
class Linear8:
    """`weight` int8 [N, K], `scale` float32 [N]: bitsandbytes' rowwise int8."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        return linear_int8(x, self.weight, self.scale, self.bias, scratch=scratch)


def gated(linear: Linear, x: Tensor, activation: Activation, scratch: Scratch | None) -> Tensor:
    """act(gate) × up of a layer that gives gate, then up: in one launch where its kernel can."""
    if isinstance(linear, PlainLinear) and serves(x, linear.weight):
        return linear_16bit(x, linear.weight, linear.bias, activation, scratch=scratch)
    if isinstance(linear, Linear4):
        return linear_4bit(x, linear.weight, linear.absmax, linear.codebook, linear.bias, activation, scratch=scratch)
    return act_mul(linear(x, scratch), activation)


class LinearModule(nn.Module):
    """A Linear in the place of an nn.Linear inside Hugging Face's own code."""

    def __init__(self, linear: Linear, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = linear
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def make_linear(name: str, views: dict[str, Tensor], quantization: Quantization) -> Linear:
    """The linear layer `name` over its views; which kind follows from the tensors that are there and where they are."""
    weight, bias = views[f"{name}.weight"], views.get(f"{name}.bias")
    on_host = weight.device.type == "cpu"
    if (absmax := views.get(f"{name}.absmax")) is not None:
        codebook: Literal["nf4", "fp4"] = "fp4" if quantization is Quantization.FP4 else "nf4"
        warm(weight.device)
        return CpuLinear4(weight, absmax, codebook, bias) if on_host else Linear4(weight, absmax, codebook, bias)
    if (scale := views.get(f"{name}.scale")) is not None and weight.dtype is torch.int8:
        return CpuLinear8(weight, scale, bias) if on_host else Linear8(weight, scale, bias)
    return CpuLinear(weight, bias) if on_host else PlainLinear(weight, bias)
