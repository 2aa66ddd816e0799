"""Computes the gated activation of an MLP, act(gate) × up, over a fused gate-and-up row."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.quantized_rows import QuantizedRows, quantize_rows_torch

Activation = Literal["silu", "gelu_tanh", "gelu"]

# The number of each activation in the kernels, Triton and CUDA alike.
GATE_CODES: Mapping[Activation | None, int] = MappingProxyType({None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3})


def act_mul(gate_up: Tensor, kind: Activation, out: Tensor | None = None) -> Tensor:
    """Return act(gate) × up [..., I] of `gate_up` [..., 2I], whose rows hold gate, then up.

    act(gate) is rounded to the row's type before the product, as in transformers.
    """
    if out is None:
        out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    if gate_up.is_cuda:
        from runtime.engine.kernels.gpu import activation

        activation.act_mul(gate_up, kind, out)
    else:
        act_mul_torch(gate_up, kind, out)
    return out


def act_mul_quantized(gate_up: Tensor, kind: Activation, codes: torch.dtype) -> QuantizedRows:
    """Return act(gate) × up of `gate_up` [..., 2I], rounded to its type and quantised by row to `codes`. This is one launch on a GPU."""
    out = QuantizedRows.empty(gate_up, gate_up.shape[-1] // 2, codes)
    if gate_up.is_cuda:
        from runtime.engine.kernels.gpu import activation

        activation.act_mul_quantized(gate_up, kind, out)
    else:
        quantize_rows_torch(act_mul(gate_up, kind), out)
    return out


def act_mul_torch(gate_up: Tensor, kind: Activation, out: Tensor) -> None:
    """Torch twin of the Triton launch."""
    gate, up = gate_up.chunk(2, dim=-1)
    if kind == "silu":
        act = functional.silu(gate)
    else:
        act = functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    torch.mul(act, up, out=out)
