"""The shrink and the expands of LoRA adapters in CUDA C++ (`adapters_shrink.cu`, `adapters_expand.cu`): which operands they support,
and their launches.

They serve steps of few rows, whose base products fill the shared memory that Triton's shrink needs, and expands of large chunks:
Triton moves sums through shared memory between the matrix unit's layout and that of y. Steps between these sizes are faster in
Triton (docs/benchmarks/lora.md).
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.engine.kernels.activation import GATE_CODES, Activation
from runtime.engine.kernels.adapters import MAX_MODULES, SMALL_CHUNK, AdapterTable, Chunks
from runtime.engine.kernels.gpu import nvrtc
from runtime.engine.kernels.scratch import Scratch

FEW_ROWS = 8
SHRINK_SOURCE, SHRINK = "adapters_shrink.cu", "adapters_shrink"
EXPAND_SOURCE, EXPAND = "adapters_expand.cu", "adapters_expand"
_TYPES = (torch.bfloat16, torch.float16)
_RANKS = 16
_SHRINK_WARPS, _SHRINK_COLUMNS = 2, 128
_MOST_TASKS = 4 * 132  # warps of a shrink
_EXPAND_WARPS, _WARP_OUTPUTS = 8, 32
_SHARED_ROWS = 4  # Up to this many, several lanes add the parts of a sum, so there may be more parts.


class _ShrinkArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "parts", "hidden", "counters", "upload", "places", "memory")),
        *(
            (name, ctypes.c_int)
            for name in (
                "x_stride",
                "in_features",
                "num_rows",
                "most_parts",
                "word",
                "table_modules",
                "first_module",
                "num_modules",
                "max_rank",
            )
        ),
    )


class _ExpandArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "out", "hidden", "upload", "places", "memory")),
        *(
            (name, ctypes.c_int)
            for name in (
                "y_stride",
                "num_rows",
                "num_parts",
                "num_outputs",
                "word",
                "table_modules",
                "first_module",
                "num_modules",
                "activation",
            )
        ),
        ("widths", ctypes.c_int * MAX_MODULES),
    )


def _half(dtype: torch.dtype) -> str:
    return f"HALF={'true' if dtype is torch.float16 else 'false'}"


def shrink_module(device: torch.device, dtype: torch.dtype) -> nvrtc.Module | None:
    """Return the compiled kernel, or None if this device does not support it."""
    return nvrtc.module(SHRINK_SOURCE, (SHRINK,), device, (_half(dtype),))


def expand_module(device: torch.device, dtype: torch.dtype, gated: bool) -> nvrtc.Module | None:
    """Return the compiled kernel, or None if this device does not support it."""
    return nvrtc.module(EXPAND_SOURCE, (EXPAND,), device, (_half(dtype), f"GATED={'true' if gated else 'false'}"))


def most_parts(num_tokens: int) -> int:
    """Return the most parts of a sum over the columns."""
    return 32 if num_tokens <= _SHARED_ROWS else 16


def tasks_of(num_tokens: int, most_chunks: int, num_modules: int) -> int:
    """Return the number of warps of a shrink, at least one for each module of each chunk."""
    groups = most_chunks * num_modules
    return max(groups, min(groups * most_parts(num_tokens), _MOST_TASKS))


def _are_aligned(x: Tensor, table: AdapterTable) -> bool:
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and (x.data_ptr() | table.memory.data_ptr()) % 16 == 0


def shrink(
    x: Tensor, chunks: Chunks, table: AdapterTable, first_module: int, slices: int, scratch: Scratch | None
) -> Tensor | None:
    """Launch h = A · x for few rows.

    Returns h as one part, or None without any effect if the kernel does not support the operands or Triton's is faster.
    """
    num_tokens, in_features = x.shape
    if (
        not x.is_cuda
        or x.dtype not in _TYPES
        or num_tokens > FEW_ROWS
        or in_features % _SHRINK_COLUMNS
        or table.max_rank % _RANKS
        or not _are_aligned(x, table)
    ):
        return None
    tasks = tasks_of(num_tokens, chunks.most, slices)
    if scratch is None or not scratch.holds(tasks * table.max_rank * SMALL_CHUNK, tasks):
        return None
    if (compiled := shrink_module(x.device, x.dtype)) is None:
        return None
    hidden = torch.empty(num_tokens * slices * table.max_rank, dtype=torch.float32, device=x.device)
    arguments = _ShrinkArguments(
        x.data_ptr(),
        scratch.partials.data_ptr(),
        hidden.data_ptr(),
        scratch.counters.data_ptr(),
        chunks.upload.data_ptr(),
        table.places.data_ptr(),
        table.memory.data_ptr(),
        x.stride(0),
        in_features,
        num_tokens,
        most_parts(num_tokens),
        chunks.word,
        table.places.shape[1],
        first_module,
        slices,
        table.max_rank,
    )
    compiled.launch(SHRINK, (-(-tasks // _SHRINK_WARPS), 1, 1), _SHRINK_WARPS * 32, 0, arguments)
    return hidden


def expand(
    y: Tensor,
    out: Tensor | None,
    parts: Tensor,
    num_parts: int,
    chunks: Chunks,
    table: AdapterTable,
    first_module: int,
    widths: Sequence[int],
    activation: Activation | None = None,
) -> bool:
    """Launch y += B · h, or with `activation` and `out` act(gate) × up of that. `parts`: of h, as `adapters.Shrunk` describes them.

    Returns False without any effect if the kernel does not support the operands or Triton's is faster.
    """
    num_tokens = y.shape[0]
    num_outputs = y.shape[1] if out is None else out.shape[1]
    if (
        not y.is_cuda
        or y.dtype not in _TYPES
        or (num_tokens > FEW_ROWS and chunks.tokens <= SMALL_CHUNK)
        or num_outputs % _WARP_OUTPUTS
        or any(width % _WARP_OUTPUTS for width in widths)
        or not _are_aligned(y, table)
    ):
        return False
    if (compiled := expand_module(y.device, y.dtype, out is not None)) is None:
        return False
    arguments = _ExpandArguments(
        y.data_ptr(),
        None if out is None else out.data_ptr(),
        parts.data_ptr(),
        chunks.upload.data_ptr(),
        table.places.data_ptr(),
        table.memory.data_ptr(),
        y.stride(0),
        num_tokens,
        num_parts,
        num_outputs,
        chunks.word,
        table.places.shape[1],
        first_module,
        len(widths),
        GATE_CODES[activation],
        (ctypes.c_int * MAX_MODULES)(*widths),
    )
    blocks = -(-num_outputs // (_EXPAND_WARPS * _WARP_OUTPUTS))
    compiled.launch(EXPAND, (chunks.most, blocks, 1), _EXPAND_WARPS * 32, 0, arguments)
    return True
