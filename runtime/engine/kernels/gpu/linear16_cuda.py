"""The 16-bit linear of up to 16 rows in CUDA C++ (`linear16.cu`): which operands it supports, and its launch."""

import torch
from torch import Tensor

from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import few_rows, nvrtc
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 16  # At 32 rows Triton's product is as fast: docs/benchmarks/engine.md
SOURCE = "linear16.cu"
NAME = "linear16"
_LEAST_ELEMENTS = 4 << 20  # elements of the smallest weight


def module(device: torch.device, dtype: torch.dtype, gated: bool, tiles: int, how: few_rows.Cut) -> nvrtc.Module | None:
    """Return the compiled kernel, or None if this device does not support it."""
    return nvrtc.module(SOURCE, (NAME,), device, few_rows.defines(dtype, gated, tiles, how))


def linear_16bit(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
    how: few_rows.Cut | None = None,
) -> bool:
    """Compute what `linear16.linear_16bit` describes for `rows` [M, K] into `out`.

    Returns False without any effect if this kernel does not support the operands.
    """
    operands = few_rows.Operands(rows, weight)
    if how is None:
        if rows.dtype not in few_rows.TYPES or weight.numel() < _LEAST_ELEMENTS or not operands.served(MAX_ROWS, gate):
            return False
        how = operands.cut(gate)
    compiled = module(rows.device, rows.dtype, gate is not None, operands.tiles, how)
    return compiled is not None and few_rows.launch(compiled, NAME, operands, bias, gate, out, scratch, how)
