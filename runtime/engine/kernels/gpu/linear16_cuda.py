"""The 16-bit linear of up to 16 rows in CUDA C++ (`linear16.cu`): which operands it supports, how its work is
divided, and its launch.

Products lose time at their beginnings and ends, and by uneven division. Here every multiprocessor has one block with
about the same number of bytes, whose ring of 128 to 192 KiB fills while the preceding kernels end. Triton's programs
come in waves, each with an end of its own.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.kernels.activation import GATE_CODES, Activation
from runtime.engine.kernels.gpu import nvrtc
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 16  # At 32 rows Triton's product is as fast: docs/benchmarks/engine.md
SOURCE = "linear16.cu"
NAME = "linear16"
_LEAST_ELEMENTS = 4 << 20  # elements of the smallest weight
_MOST_OUTPUTS = 16384  # of an ungated weight: Triton reads the output projection 8 % faster
_COLUMNS = 256
_WARPS, _BRINGERS = 8, 4
_TYPES = (torch.bfloat16, torch.float16)


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out", "partials", "counters")),
        *(
            (name, ctypes.c_int)
            for name in (
                "num_rows",
                "num_outputs",
                "in_features",
                "x_stride",
                "outputs_each",
                "chunks_each",
                "stages",
                "x_stages",
                "activation",
            )
        ),
    )


@dataclass(frozen=True)
class Cut:
    """How the work of a launch is divided.

    Attributes:
        height: rows of W in a slab, in units of 16.
        slabs: slabs that a block sums at once.
        splits: parts of K.
        stages: slabs of W in shared memory.
        x_stages: chunks of x in shared memory.
    """

    height: int
    slabs: int
    splits: int
    stages: int
    x_stages: int


def outputs_each(num_outputs: int, splits: int, processors: int) -> int:
    """Return the number of outputs of one block, a multiple of 8."""
    return -(-num_outputs // (8 * max(1, processors // splits))) * 8


def cut(num_outputs: int, in_features: int, tiles: int, gated: bool, processors: int) -> Cut:
    """Choose how to divide the work, from docs/benchmarks/engine.md. `tiles` counts the rows of x in units of 8."""
    x_stages = 4 if tiles == 1 else 3
    if gated:
        return Cut(4, 4, 1, 6 if tiles == 1 else 4, x_stages)
    height = 4 if num_outputs * in_features >= 16 << 20 else 2
    # A block's outputs fill at least three quarters of a slab. Dividing K costs one more round, so then of the larger slab.
    splits = 1
    while (
        splits < 8
        and outputs_each(num_outputs, splits, processors) < (height * 12 if splits == 1 else 48)
        and in_features >= 4 * splits * _COLUMNS
    ):
        splits *= 2
    return Cut(height, 2, splits, 4 if height == 4 else 8, x_stages)


def module(device: torch.device, dtype: torch.dtype, gated: bool, tiles: int, how: Cut) -> nvrtc.Module | None:
    """Return the compiled kernel, or None if this device does not support it."""
    answers = {False: "false", True: "true"}
    defines = (
        f"HALF={answers[dtype is torch.float16]}",
        f"GATED={answers[gated]}",
        f"TILES={tiles}",
        f"HEIGHT={how.height}",
        f"SLABS={how.slabs}",
    )
    return nvrtc.module(SOURCE, (NAME,), device, defines)


def serves(rows: Tensor, weight: Tensor, gate: Activation | None) -> bool:
    """Return whether the kernel supports these operands and is faster for them."""
    num_rows, in_features = rows.shape
    return (
        rows.is_cuda
        and rows.dtype in _TYPES
        and 0 < num_rows <= MAX_ROWS
        and in_features % _COLUMNS == 0
        and weight.is_contiguous()
        and weight.numel() >= _LEAST_ELEMENTS
        and (gate is not None or weight.shape[0] < _MOST_OUTPUTS)
        and rows.stride(1) == 1
        and rows.stride(0) % 8 == 0
        and (rows.data_ptr() | weight.data_ptr()) % 16 == 0
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def linear_16bit(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
    how: Cut | None = None,
) -> bool:
    """Compute what `linear16.linear_16bit` describes for `rows` [M, K] into `out`.

    Returns False without any effect if this kernel does not support the operands.
    """
    if how is None and not serves(rows, weight, gate):
        return False
    num_rows, in_features = rows.shape
    gated = gate is not None
    num_outputs = weight.shape[0] // (2 if gated else 1)
    tiles = -(-num_rows // 8)
    processors = _processors(rows.device)
    how = how or cut(num_outputs, in_features, tiles, gated, processors)
    if (compiled := module(rows.device, rows.dtype, gated, tiles, how)) is None:
        return False
    chunks = in_features // _COLUMNS
    chunks_each = -(-chunks // min(how.splits, chunks))
    splits = -(-chunks // chunks_each)
    each = outputs_each(num_outputs, splits, processors)
    columns = -(-num_outputs // each)
    slabs = -(-each // (how.height * 16 // (2 if gated else 1)))
    if splits > 1:
        elements = splits * columns * slabs * how.height * tiles * 128
        if scratch is None:
            scratch = Scratch.allocate(rows.device, partial_elements=elements, num_counters=columns)
        elif not scratch.holds(elements, columns):
            return False
    stages, x_stages = min(how.stages, slabs * chunks_each), min(how.x_stages, chunks_each)
    shared_bytes = (
        (stages * how.height * 16 + x_stages * tiles * 8) * _COLUMNS * 2
        + 2 * _WARPS * tiles * 512
        + 16
        + (stages + x_stages) * 16
    )
    arguments = _Arguments(
        rows.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        None if scratch is None else scratch.partials.data_ptr(),
        None if scratch is None else scratch.counters.data_ptr(),
        num_rows,
        num_outputs,
        in_features,
        rows.stride(0),
        each,
        chunks_each,
        stages,
        x_stages,
        GATE_CODES[gate],
    )
    compiled.launch(NAME, (columns, splits, 1), (_WARPS + _BRINGERS + 1) * 32, shared_bytes, arguments)
    return True
