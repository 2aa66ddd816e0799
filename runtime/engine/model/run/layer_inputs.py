"""Computes the inputs of linear layers: normalised rows, and the gated activation of an MLP.

Where the layer multiplies 8 bits by 8, the kernel that computes its input also quantises it.
"""

import torch
from torch import Tensor

from runtime.engine.kernels.activation import Activation, act_mul, act_mul_quantized
from runtime.engine.kernels.linear4 import linear_4bit
from runtime.engine.kernels.linear8 import GATED_ROWS, linear_8bit
from runtime.engine.kernels.linear16 import linear_16bit, serves
from runtime.engine.kernels.norm import add_rms_norm, add_rms_norm_quantized, rms_norm, rms_norm_quantized
from runtime.engine.kernels.quantized_rows import QuantizedRows
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.run.linear import Linear, Linear4, Linear8, PlainLinear


def input_codes(linear: Linear) -> torch.dtype | None:
    """Return the type to which the layer's input is quantised. None = the layer takes activations as they are."""
    return linear.weight.dtype if isinstance(linear, Linear8) else None


def product(linear: Linear, x: Tensor | QuantizedRows, scratch: Scratch | None) -> Tensor:
    """Return the layer's output. Codes must be of the type that `input_codes` returns."""
    if not isinstance(x, QuantizedRows):
        return linear(x, scratch)
    if not isinstance(linear, Linear8):
        raise TypeError(f"{type(linear).__name__} does not take quantised rows")
    return linear(x, scratch)


def normed(
    branch: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    plus_one: bool,
    codes: torch.dtype | None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """Add `branch`, if there is one, to `residual` in place, and normalise the sum. Returns (normed, residual)."""
    if branch is None:
        if codes is None:
            return rms_norm(residual, weight, eps, plus_one), residual
        return rms_norm_quantized(residual, weight, eps, codes, plus_one), residual
    if codes is None:
        return add_rms_norm(branch, residual, weight, eps, plus_one)
    return add_rms_norm_quantized(branch, residual, weight, eps, codes, plus_one)


def gated(
    linear: Linear,
    x: Tensor | QuantizedRows,
    activation: Activation,
    codes: torch.dtype | None,
    scratch: Scratch | None,
) -> Tensor | QuantizedRows:
    """Return act(gate) × up for a layer whose output is gate followed by up, in one launch if the kernel supports it.

    A separate launch for the activation quantises its result to `codes` unless that is None.
    """
    if isinstance(linear, PlainLinear) and not isinstance(x, QuantizedRows) and serves(x, linear.weight):
        return linear_16bit(x, linear.weight, linear.bias, activation, scratch=scratch)
    if isinstance(linear, Linear4) and not isinstance(x, QuantizedRows):
        return linear_4bit(x, linear.weight, linear.absmax, linear.codebook, linear.bias, activation, scratch=scratch)
    if isinstance(linear, Linear8) and isinstance(x, QuantizedRows) and len(x.codes) <= GATED_ROWS:
        return linear_8bit(x, linear.weight, linear.scale, linear.bias, activation, scratch=scratch)
    gate_up = product(linear, x, scratch)
    return act_mul(gate_up, activation) if codes is None else act_mul_quantized(gate_up, activation, codes)
