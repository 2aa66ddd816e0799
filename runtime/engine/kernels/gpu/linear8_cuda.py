"""The linear over int8 and e4m3 weights of few rows in CUDA C++ (`linear8.cu`): which operands it supports, and its launch."""

import torch
from torch import Tensor

from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import few_rows, nvrtc
from runtime.engine.kernels.quantized_rows import QuantizedRows
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 16
SOURCE = "linear8.cu"
NAME = "linear8"


def module(
    device: torch.device, codes: torch.dtype, dtype: torch.dtype, gated: bool, tiles: int, how: few_rows.Cut
) -> nvrtc.Module | None:
    """Return the kernel compiled for a type of codes and one of results, or None if this device does not support it."""
    numbers = f"INT8={'true' if codes is torch.int8 else 'false'}"
    return nvrtc.module(SOURCE, (NAME,), device, (numbers, *few_rows.defines(dtype, gated, tiles, how)))


def serves(x: QuantizedRows, weight: Tensor, gate: Activation | None) -> bool:
    """Return whether the kernel supports these operands and is faster for them."""
    return x.dtype in few_rows.TYPES and few_rows.Operands(x.codes, weight).served(MAX_ROWS, gate)


def linear_8bit(
    x: QuantizedRows,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
    how: few_rows.Cut | None = None,
) -> bool:
    """Compute what `linear8.linear_8bit` describes into `out`.

    Returns False without any effect if this kernel does not support the operands.
    """
    operands = few_rows.Operands(x.codes, weight, x.scale, scale)
    if how is None:
        if not serves(x, weight, gate):
            return False
        how = operands.cut(gate)
    compiled = module(weight.device, weight.dtype, x.dtype, gate is not None, operands.tiles, how)
    return compiled is not None and few_rows.launch(compiled, NAME, operands, bias, gate, out, scratch, how)
