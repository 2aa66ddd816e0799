"""Divides and launches W · xᵀ for few rows of x in CUDA C++ (`few_rows.cuh`), over numbers of 8 or 16 bits.

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

PITCH = 512  # bytes of a row of W in a chunk of K
_LEAST_BYTES = 4 << 20  # of a weight
_LARGE_BYTES = 32 << 20  # of a weight that is cut into slabs of 64 rows
_MOST_OUTPUTS = 16384  # of an ungated weight: Triton reads the output projection 8 % faster
_WARPS, _BRINGERS = 8, 4
TYPES = (torch.bfloat16, torch.float16)  # of the results


class _Arguments(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "weight", "scale", "x_scale", "bias", "out", "partials", "counters")
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "num_rows",
                "num_outputs",
                "row_bytes",
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


@dataclass(frozen=True)
class Operands:
    """What a launch multiplies: `x` [M, K] and `weight` [rows, K] of one type, and float32 scales of their rows unless both are None."""

    x: Tensor
    weight: Tensor
    x_scale: Tensor | None = None
    scale: Tensor | None = None

    @property
    def tiles(self) -> int:
        """The rows of x in units of 8."""
        return -(-len(self.x) // 8)

    @property
    def row_bytes(self) -> int:
        return self.weight.shape[1] * self.weight.element_size()

    def served(self, max_rows: int, gate: Activation | None) -> bool:
        """Return whether the kernel supports these operands and is faster for them."""
        x, weight = self.x, self.weight
        return (
            x.is_cuda
            and 0 < len(x) <= max_rows
            and self.row_bytes % PITCH == 0
            and weight.is_contiguous()
            and len(weight) * self.row_bytes >= _LEAST_BYTES
            and (gate is not None or len(weight) < _MOST_OUTPUTS)
            and x.stride(1) == 1
            and x.stride(0) * x.element_size() % 16 == 0
            and (x.data_ptr() | weight.data_ptr()) % 16 == 0
        )

    def cut(self, gate: Activation | None) -> Cut:
        """Choose how to divide the work on the operands' GPU."""
        return cut(num_outputs(self.weight, gate), self.row_bytes, self.tiles, gate is not None, self.processors)

    @property
    def processors(self) -> int:
        return _processors(self.x.device)


def num_outputs(weight: Tensor, gate: Activation | None) -> int:
    """Return the results of one row of x: half of the weight's rows if these are gate and up."""
    return len(weight) // (1 if gate is None else 2)


def outputs_each(num_outputs: int, splits: int, processors: int) -> int:
    """Return the number of outputs of one block, a multiple of 8."""
    return -(-num_outputs // (8 * max(1, processors // splits))) * 8


def cut(num_outputs: int, row_bytes: int, tiles: int, gated: bool, processors: int) -> Cut:
    """Choose how to divide the work, from docs/benchmarks/engine.md. `tiles` counts the rows of x in units of 8, at most 4."""
    x_stages = 4 if tiles == 1 else 3
    if gated:
        return Cut(4, 4 if tiles <= 2 else 2, 1, 6 if tiles == 1 else 4, x_stages)
    height = 4 if num_outputs * row_bytes >= _LARGE_BYTES else 2
    # A block's outputs fill at least three quarters of a slab. Dividing K costs one more round, so then of the larger slab.
    splits = 1
    while (
        splits < 8
        and outputs_each(num_outputs, splits, processors) < (height * 12 if splits == 1 else 48)
        and row_bytes >= 4 * splits * PITCH
    ):
        splits *= 2
    return Cut(height, 2, splits, 4 if height == 4 else 8, x_stages)


def defines(dtype: torch.dtype, gated: bool, tiles: int, how: Cut) -> tuple[str, ...]:
    """Return the definitions that a source needs to be compiled for results of a type and a division of the work."""
    answers = {False: "false", True: "true"}
    return (
        f"FP16={answers[dtype is torch.float16]}",
        f"GATED={answers[gated]}",
        f"TILES={tiles}",
        f"HEIGHT={how.height}",
        f"SLABS={how.slabs}",
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def launch(
    compiled: nvrtc.Module,
    name: str,
    operands: Operands,
    bias: Tensor | None,
    gate: Activation | None,
    out: Tensor,
    scratch: Scratch | None,
    how: Cut,
) -> bool:
    """Compute x · Wᵀ + bias, with the gate if there is one, into `out`. Returns False without any effect if `scratch` is too small."""
    x, weight, tiles = operands.x, operands.weight, operands.tiles
    outputs = num_outputs(weight, gate)
    chunks = operands.row_bytes // PITCH
    chunks_each = -(-chunks // min(how.splits, chunks))
    splits = -(-chunks // chunks_each)
    each = outputs_each(outputs, splits, operands.processors)
    columns = -(-outputs // each)
    slabs = -(-each // (how.height * 16 // (1 if gate is None else 2)))
    if splits > 1:
        elements = splits * columns * slabs * how.height * tiles * 128
        if scratch is None:
            scratch = Scratch.allocate(x.device, partial_elements=elements, num_counters=columns)
        elif not scratch.holds(elements, columns):
            return False
    stages, x_stages = min(how.stages, slabs * chunks_each), min(how.x_stages, chunks_each)
    arguments = _Arguments(
        x.data_ptr(),
        weight.data_ptr(),
        _address(operands.scale),
        _address(operands.x_scale),
        _address(bias),
        out.data_ptr(),
        None if scratch is None else scratch.partials.data_ptr(),
        None if scratch is None else scratch.counters.data_ptr(),
        len(x),
        outputs,
        operands.row_bytes,
        x.stride(0) * x.element_size(),
        each,
        chunks_each,
        stages,
        x_stages,
        GATE_CODES[gate],
    )
    compiled.launch(
        name,
        (columns, splits, 1),
        (_WARPS + _BRINGERS + 1) * 32,
        shared_bytes(tiles, how.height, stages, x_stages),
        arguments,
    )
    return True


def shared_bytes(tiles: int, height: int, stages: int, x_stages: int) -> int:
    """Return the shared memory of a block: both rings, the sums of two slabs and the barriers."""
    return (
        (stages * height * 16 + x_stages * tiles * 8) * PITCH + 2 * _WARPS * tiles * 512 + 16 + (stages + x_stages) * 16
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
