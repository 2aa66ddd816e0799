"""The 4-bit linear of up to 16 rows in CUDA C++ (`linear4.cu`): which operands it supports, how its work is divided,
and its launch.

In Triton, dequantising in registers is limited by integer arithmetic (44 µs at one row of 28672×4096, where the bytes
need 16; 27 here). A lookup table in shared memory without bank conflicts, with one copy per lane, cannot be expressed
in Triton.
"""

import ctypes
import functools

import torch
from torch import Tensor

from runtime.checkpoint.layout_4bit import block_of
from runtime.checkpoint.quantized_shapes import BLOCK
from runtime.engine.kernels.codebooks import Codebook, codebook_values
from runtime.engine.kernels.gpu import nvrtc
from runtime.engine.kernels.scratch import Scratch

MAX_ROWS = 16
SOURCE = "linear4.cu"
_PROCESSORS = 132  # multiprocessors of the GPU that the measurements are from
_WARPS = 16
_TABLE_BYTES = 256 * 32 * 4
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
# Tiles of 8 rows of x → (groups of K per warp, blocks of 16 outputs per iteration), as instantiated in linear4.cu.
_INSTANCES = {1: (2, 1), 2: (1, 2)}
_NAMES = tuple(f"linear4_{kind}_{tiles}" for kind in _TYPES.values() for tiles in _INSTANCES)


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "absmax", "x", "bias", "out", "partials", "counters")),
        *(
            (name, ctypes.c_int)
            for name in ("num_rows", "num_outputs", "in_features", "x_stride", "num_groups", "groups_each", "k_warps")
        ),
        ("codes", ctypes.c_ushort * 16),
    )


@functools.cache
def codes_16bit(codebook: Codebook, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the bit patterns of the 16 values in a 16-bit type."""
    return tuple(
        value & 0xFFFF
        for value in torch.tensor(codebook_values(codebook), dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    )


def module(device: torch.device, block: int = BLOCK) -> nvrtc.Module | None:
    """Return the compiled kernels for blocks of 64 or 32 elements, or None if this device does not support them."""
    return nvrtc.module(SOURCE, _NAMES, device, block_defines(block))


def block_defines(block: int) -> tuple[str, ...]:
    """Return the definitions to compile for blocks of this many elements."""
    return () if block == BLOCK else ("SMALL_BLOCKS=true",)


def splits_of_k(num_outputs: int, num_groups: int) -> int:
    """Return the number of parts of K, from docs/benchmarks/linear.md. With few outputs, whole K would leave the GPU idle."""
    if num_outputs >= 16384:
        return 1
    return max(1, min(4, num_groups // 16))


def warps_of_k(groups_each: int, groups_a_warp: int) -> int:
    """Return the number of warps along K that makes all passes over `groups_each` groups about equally full."""
    passes = -(-groups_each // (_WARPS * groups_a_warp))
    groups_a_pass = -(-groups_each // passes)
    return -(-groups_a_pass // groups_a_warp)


def linear_4bit(
    rows: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch | None,
    splits: int = 0,
) -> bool:
    """Compute rows [M, K] · Wᵀ into `out`. Returns False without any effect if this kernel does not support the operands."""
    if not rows.is_cuda or rows.dtype not in _TYPES or rows.shape[0] > MAX_ROWS:
        return False
    if rows.stride(1) != 1 or rows.stride(0) % 4 or rows.data_ptr() % 8:
        return False
    if (compiled := module(rows.device, block_of(weight, absmax))) is None:
        return False
    num_rows, in_features = rows.shape
    num_outputs, num_groups = weight.shape[0], weight.shape[1] // BLOCK
    tiles = -(-num_rows // 8)
    groups_a_warp, blocks_a_turn = _INSTANCES[tiles]
    num_blocks = -(-num_outputs // 16)
    # Reading a single row of x again is cheap, and summing parts costs an iteration.
    splits = splits or (
        splits_of_k(num_outputs, num_groups) if tiles > 1 else max(1, min(_PROCESSORS // num_blocks, num_groups // 8))
    )
    groups_each = -(-num_groups // min(splits, num_groups))
    splits = -(-num_groups // groups_each)
    columns = min(num_blocks, max(1, _PROCESSORS // splits))
    if splits > 1:
        elements = splits * num_blocks * tiles * 128
        if scratch is None:
            scratch = Scratch.allocate(rows.device, partial_elements=elements, num_counters=columns)
        elif not scratch.holds(elements, columns):
            return False
    k_warps = warps_of_k(groups_each, groups_a_warp)
    sums_bytes = 2 * _WARPS * blocks_a_turn * tiles * 512
    if groups_each > k_warps * groups_a_warp:  # Sums over passes stay in shared memory.
        room = (nvrtc.SHARED_BYTES - _TABLE_BYTES - sums_bytes) // (tiles * 512)
        columns = max(columns, -(-num_blocks // room))
        sums_bytes += -(-num_blocks // columns) * tiles * 512
    arguments = _Arguments(
        weight.data_ptr(),
        absmax.data_ptr(),
        rows.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        None if scratch is None else scratch.partials.data_ptr(),
        None if scratch is None else scratch.counters.data_ptr(),
        num_rows,
        num_outputs,
        in_features,
        rows.stride(0),
        num_groups,
        groups_each,
        k_warps,
        (ctypes.c_ushort * 16)(*codes_16bit(codebook, rows.dtype)),
    )
    compiled.launch(
        f"linear4_{_TYPES[rows.dtype]}_{tiles}", (columns, splits, 1), _WARPS * 32, _TABLE_BYTES + sums_bytes, arguments
    )
    return True
