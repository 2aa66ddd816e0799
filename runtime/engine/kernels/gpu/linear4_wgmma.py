"""The 4-bit linear on Hopper's matrix unit in CUDA C++ (`linear4_wgmma.cu`): which operands it supports, how its work
is divided, and its launch.

Weights are dequantised once per tile of up to 256 rows of x, into registers that the matrix unit reads. Triton's own
product first writes them to shared memory.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.checkpoint.layout_4bit import block_of
from runtime.checkpoint.quantized_shapes import BLOCK
from runtime.engine.kernels.activation import GATE_CODES, Activation
from runtime.engine.kernels.codebooks import Codebook
from runtime.engine.kernels.gpu import nvrtc
from runtime.engine.kernels.gpu.linear4_cuda import block_defines, codes_16bit
from runtime.engine.kernels.gpu.tensormap import TENSOR_MAP_BYTES, tensor_map
from runtime.engine.kernels.scratch import Scratch

LARGE_OUTPUTS = 16384
SOURCE = "linear4_wgmma.cu"
_BARRIER_BYTES = 48 * 8 + 8
_TYPES = {torch.bfloat16: "IS_HALF=false", torch.float16: "IS_HALF=true"}
SHAPES = ((16, 4), (32, 4), (64, 4), (128, 3), (256, 2))
_X_COLUMNS = 64  # of x in a row of its tiles
_MOST_PARTS = 16  # of a tile: a counter has 16 bits for them
_MAP = ctypes.c_ubyte * TENSOR_MAP_BYTES
_NAMES = tuple(f"linear4_wgmma_{columns}_{groups}" for columns, groups in SHAPES)


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, _MAP) for name in ("words", "x")),
        *((name, ctypes.c_void_p) for name in ("absmax", "bias", "out", "partials", "counters")),
        *(
            (name, ctypes.c_int)
            for name in (
                "num_rows",
                "num_outputs",
                "num_groups",
                "gate",
                "num_units",
                "tile_units",
                "tiles_m",
                "x_stages",
                "w_stages",
            )
        ),
        ("codes", ctypes.c_ushort * 16),
        ("padding", ctypes.c_ubyte * 64),  # the kernel's struct is a multiple of 64 bytes
    )


@dataclass(frozen=True)
class Cut:
    """How the work of a launch is divided.

    A tile is `columns` rows of x by 64 · `groups` rows of W. `blocks` share the tiles' units of K evenly. A stage of x
    is 64 elements of K, a stage of W is 256.
    """

    columns: int
    groups: int
    blocks: int
    x_stages: int
    w_stages: int

    @property
    def piece_bytes(self) -> int:
        return self.groups * min(32, self.columns) * 72 * 2

    @property
    def shared_bytes(self) -> int:
        table_bytes = 256 * (256 if self.columns <= 32 else 128)
        rings_bytes = (
            self.x_stages * self.columns * 128 * _x_turns(self.columns) + self.w_stages * self.groups * 64 * 128
        )
        return table_bytes + 1024 + rings_bytes + self.piece_bytes + _BARRIER_BYTES


def module(device: torch.device, dtype: torch.dtype, block: int = BLOCK) -> nvrtc.Module | None:
    """Return the compiled kernels for blocks of 64 or 32 elements, or None if this device does not support them: only Hopper has `wgmma`."""
    if nvrtc.architecture(device) != "sm_90a":
        return None
    return nvrtc.module(SOURCE, _NAMES, device, (_TYPES[dtype], *block_defines(block)))


def _x_turns(columns: int) -> int:
    """Return how many stages of x are fetched together: separate copies of small tiles would be slow."""
    return 4 if columns <= 32 else 2 if columns == 64 else 1


def choose(num_rows: int, num_outputs: int, processors: int) -> Cut | None:
    """Return how to divide a product, or None if another kernel is faster: docs/benchmarks/linear.md."""
    if num_rows > 512 or num_rows <= (8 if num_outputs >= LARGE_OUTPUTS else 16):
        return None
    columns, groups = next((shape for shape in SHAPES if shape[0] >= num_rows), SHAPES[-1])
    tiles = -(-num_outputs // (64 * groups)) * -(-num_rows // columns)
    # Whole tiles if they keep most of the GPU busy. An equal number of blocks per tile if there are few tiles.
    blocks = (
        tiles
        if 0.8 * processors <= tiles <= processors
        else processors // tiles * tiles
        if tiles < processors
        else processors
    )
    return fill(columns, groups, blocks)


def fill(columns: int, groups: int, blocks: int, shared_bytes: int = nvrtc.SHARED_BYTES) -> Cut:
    """Return a cut with as many stages as shared memory holds: first up to four of W, then up to eight of x."""
    # At least two stages of x, because a stage is released only when the next is in use.
    w_stages, x_stages = 4, max(2, 4 // _x_turns(columns))
    while w_stages > 2 and Cut(columns, groups, blocks, x_stages, w_stages).shared_bytes > shared_bytes:
        w_stages -= 1
    while (
        x_stages < 8 // _x_turns(columns)
        and Cut(columns, groups, blocks, x_stages + 1, w_stages).shared_bytes <= shared_bytes
    ):
        x_stages += 1
    return Cut(columns, groups, blocks, x_stages, w_stages)


def linear_4bit(
    rows: Tensor,
    weight: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    bias: Tensor | None,
    out: Tensor,
    scratch: Scratch | None,
    cut: Cut,
    gate: Activation | None = None,
) -> bool:
    """Compute rows [M, K] · Wᵀ into `out`.

    With `gate`, the rows of W are those of gate, then those of up, and the result is act(gate) × up. Returns False
    without any effect if this kernel does not support the operands.
    """
    num_rows, in_features = rows.shape
    num_outputs, num_groups = weight.shape[0], weight.shape[1] // BLOCK
    if gate is not None and (cut.groups % 2 or num_outputs % 2):
        return False
    if not rows.is_cuda or rows.dtype not in _TYPES or rows.stride(1) != 1 or rows.stride(0) % 8:
        return False
    if in_features % _X_COLUMNS or any(t.data_ptr() % 16 for t in (rows, weight, out)):
        return False
    if (compiled := module(rows.device, rows.dtype, block_of(weight, absmax))) is None:
        return False
    tile_outputs = 64 * cut.groups
    copy_rows = tile_outputs
    if gate is not None:
        num_outputs, copy_rows = num_outputs // 2, tile_outputs // 2
    tiles_n, tiles_m, tile_units = -(-num_outputs // copy_rows), -(-num_rows // cut.columns), -(-num_groups // 2)
    num_tiles = tiles_n * tiles_m
    blocks = min(cut.blocks, num_tiles * tile_units // -(-tile_units // (_MOST_PARTS - 2)))
    if num_tiles % blocks:  # A block has at most two parts of tiles.
        if scratch is None:
            scratch = Scratch.allocate(
                rows.device, partial_elements=2 * blocks * tile_outputs * cut.columns, num_counters=num_tiles
            )
        blocks = min(blocks, scratch.partials.numel() // (2 * tile_outputs * cut.columns))
        if blocks == 0 or not scratch.holds(0, num_tiles):
            return False
    arguments = _Arguments(
        _MAP.from_buffer_copy(
            tensor_map(
                weight.data_ptr(),
                "byte",
                (num_groups * 64, weight.shape[0]),
                (num_groups * 64,),
                (128, copy_rows),
                True,
            )
        ),
        _MAP.from_buffer_copy(
            tensor_map(
                rows.data_ptr(),
                "16-bit",
                (64, num_rows, in_features // 64),
                (rows.stride(0) * 2, 128),
                (64, cut.columns, _x_turns(cut.columns)),
                True,
            )
        ),
        absmax.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        None if scratch is None else scratch.partials.data_ptr(),
        None if scratch is None else scratch.counters.data_ptr(),
        num_rows,
        num_outputs,
        num_groups,
        GATE_CODES[gate],
        num_tiles * tile_units,
        tile_units,
        tiles_m,
        cut.x_stages,
        cut.w_stages,
        (ctypes.c_ushort * 16)(*codes_16bit(codebook, rows.dtype)),
    )
    name = f"linear4_wgmma_{cut.columns}_{cut.groups}"
    compiled.launch(name, (blocks, 1, 1), (cut.groups + 1) * 128, cut.shared_bytes, arguments)
    return True
