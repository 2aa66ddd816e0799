"""The 4-bit linear of some dozens to some hundreds of rows on Hopper's matrix unit, in CUDA C++ (`linear4_wide.cu`): when it serves, and its two launches.

Weights are unpacked once for each 128 rows of x, into registers that the matrix unit reads; Triton's own product first writes them to shared memory.
"""

import ctypes

import torch
from torch import Tensor

from runtime.engine.kernels.gpu import native
from runtime.engine.kernels.gpu.linear4_cuda import codes_16bit
from runtime.engine.kernels.layout import BLOCK, GROUP
from runtime.engine.kernels.linear4 import Codebook
from runtime.engine.kernels.scratch import Scratch

SOURCE = "linear4_wide.cu"
TILE_OUTPUTS = 256
_STAGES = 8
_PROCESSORS = 132  # multiprocessors of the GPU that this was measured on
_TABLE_BYTES = 256 * 32 * 4
_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_NAMES = ("linear4_image", *(f"linear4_wide_{kind}_{columns}" for kind in _TYPES.values() for columns in (64, 128)))


class _ImageArguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("image", ctypes.c_void_p),
        ("num_rows", ctypes.c_int), ("in_features", ctypes.c_int), ("x_stride", ctypes.c_int), ("tile_rows", ctypes.c_int),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "absmax", "image", "bias", "out", "partials", "counters")),
        *((name, ctypes.c_int) for name in ("num_rows", "num_outputs", "num_groups", "groups_each")),
        ("codes", ctypes.c_ushort * 16),
    )


def module(device: torch.device) -> native.Module | None:
    """The compiled kernels, if they can be had on this device: `wgmma` is Hopper's alone."""
    return native.module(SOURCE, _NAMES, device) if native.architecture(device) == "sm_90a" else None


def serves(num_rows: int, num_outputs: int, in_features: int) -> bool:
    """Where it was the fastest of what there is: docs/benchmarks/linear.md."""
    size = num_outputs * in_features
    if num_rows <= 32:
        return num_outputs >= 16384
    if num_rows <= 64:
        return size > 20 << 20
    if num_rows <= 128:
        return True
    return num_rows <= (512 if size > 64 << 20 else 256) and size > 20 << 20


def linear_4bit(
    rows: Tensor, weight: Tensor, absmax: Tensor, codebook: Codebook, bias: Tensor | None, out: Tensor, scratch: Scratch | None,
    columns: int = 0, splits: int = 0,
) -> bool:
    """`rows` [M, K] times the transpose of the weight into `out`. False, and nothing done, where this kernel can't."""
    if not rows.is_cuda or rows.dtype not in _TYPES or out.data_ptr() % 16 or rows.stride(1) != 1 or (compiled := module(rows.device)) is None:
        return False
    num_rows, in_features = rows.shape
    num_outputs, num_groups = weight.shape[0], weight.shape[1] // BLOCK
    columns = columns or (64 if num_rows <= 64 else 128)
    tiles_n, tiles_m = -(-num_outputs // TILE_OUTPUTS), -(-num_rows // columns)
    splits = splits or choose_splits(tiles_n * tiles_m, num_groups)
    groups_each = -(-num_groups // splits)
    splits = -(-num_groups // groups_each)
    image_elements = tiles_m * columns * num_groups * GROUP // 2  # in units of partial sums
    elements = image_elements + (tiles_n * tiles_m * splits * TILE_OUTPUTS * columns if splits > 1 else 0)
    if scratch is None:
        scratch = Scratch.allocate(rows.device, partial_elements=elements, num_counters=tiles_n * tiles_m)
    elif not scratch.holds(elements, tiles_n * tiles_m):
        return False
    image = scratch.partials.data_ptr()
    compiled.launch(
        "linear4_image", (2 * num_groups, tiles_m, columns // 32), 256, 0,
        _ImageArguments(rows.data_ptr(), image, num_rows, in_features, rows.stride(0), columns),
    )
    arguments = _Arguments(
        weight.data_ptr(), absmax.data_ptr(), image, None if bias is None else bias.data_ptr(), out.data_ptr(), image + 4 * image_elements,
        scratch.counters.data_ptr(), num_rows, num_outputs, num_groups, groups_each, (ctypes.c_ushort * 16)(*codes_16bit(codebook, rows.dtype)),
    )
    shared_bytes = _TABLE_BYTES + 1024 + _STAGES * (columns * 128 + 16)
    compiled.launch(f"linear4_wide_{_TYPES[rows.dtype]}_{columns}", (tiles_n, tiles_m, splits), 256, shared_bytes, arguments)
    return True


def choose_splits(num_tiles: int, num_groups: int) -> int:
    """Parts of K, so that as many blocks as possible run at once."""
    return max(1, min(_PROCESSORS // num_tiles, num_groups // 8))
