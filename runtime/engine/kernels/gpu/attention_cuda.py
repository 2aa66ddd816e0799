"""Decode attention in CUDA C++ (`attention_decode.cu`): which operands it supports, how its work is divided, and its
launch.

It is faster than Triton because there every program begins with a chain of dependent loads (row, page table, keys,
values). Here a warp requests its first tiles before the preceding kernels have ended.

That is safe because of the order of writes. `build_inputs` writes lengths, slots and page tables, and earlier steps
wrote the keys and values of earlier tokens. Between either and the first attention of a step there is a launch that
does not overlap (the inputs' own, the embedding), so they are in memory before anything later begins. A row's token
of this step is read after the wait. Where every row has one token, no row reads another row's: the scheduler does not
let a sequence share a block that a lone token fills in the same plan.
"""

import ctypes
import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.engine.kernels.gpu import nvrtc
from runtime.engine.kernels.scratch import Scratch

SOURCE = "attention_decode.cu"
NAME = "attention_decode"
MAX_PAIRS = 512  # of rows and KV heads with keys of 16 bits. Above, Triton's many small programs are as fast or faster.
_MAX_ROWS = 1024  # MAX_ROWS of attention_rows.cuh and attention_decode.cu
_TILE = 16
_SHORT_FP8 = 4096  # tokens of all rows below which one head per block is as fast
_MANY_PAIRS_FP8 = 1024
_LEAST = 12
_LOG2E = 1.4426950408889634
_HEAD_DIMS = (64, 80, 96, 128, 256)


class _Arguments(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("out", "q", "k", "v", "sinks", "table", "row_slots", "starts", "lens", "partials", "counters")
        ),
        ("page_unit", ctypes.c_longlong),
        *(
            (name, ctypes.c_int)
            for name in (
                "table_stride",
                "num_rows",
                "num_kv_heads",
                "group",
                "heads_each",
                "whole",
                "block_shift",
                "window",
                "early",
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


@dataclass(frozen=True)
class Cut:
    """How the work of a launch is divided.

    Attributes:
        heads_each: KV heads per block.
        blocks: blocks that share the tiles of these heads.
        whole: a row of up to this many tiles is not divided.
        warps: warps per block.
        stages: tiles in a warp's ring.
        early: fill the ring before the preceding kernels have ended. False only in measurements.
    """

    heads_each: int
    blocks: int
    whole: int
    warps: int
    stages: int
    early: bool = True

    def shared_bytes(self, num_rows: int, group: int, head_dim: int, key_bytes: int) -> int:
        """Return the size of the rows and, for each warp, its counters, the sums of its heads and its ring.

        `key_bytes`: of one channel of a key.
        """
        ring = self.stages * 2 * _TILE * (head_dim * key_bytes + 16)
        return (num_rows + 1) * 16 + self.warps * (16 + 128 + group * (head_dim + 4) * 4 + ring)


def module(
    device: torch.device, head_dim: int, dtype: torch.dtype, group: int, how: Cut, *, fp8: bool = False
) -> nvrtc.Module | None:
    """Return the compiled kernel, or None if this device does not support it. `fp8`: keys and values are e4m3."""
    defines = (
        f"HEAD_DIM={head_dim}",
        f"HALF={str(dtype is torch.float16).lower()}",
        f"FP8={str(fp8).lower()}",
        f"TILES={-(-group // 8)}",
        f"WARPS={how.warps}",
        f"STAGES={how.stages}",
    )
    return nvrtc.module(SOURCE, (NAME,), device, defines)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def cut(
    num_rows: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    max_context_len: int,
    processors: int,
    key_bytes: int = 2,
) -> Cut:
    """Choose how to divide the work, from the measurements in docs/benchmarks/linear.md (FP8: engine.md).

    Rows stay whole if there are enough of them, because merging parts costs some microseconds. Each pair of row and KV head gets a multiprocessor if
    there are few pairs, and half of one otherwise. `key_bytes`: of one channel of a key.
    """
    if key_bytes == 1:
        return _cut_fp8(num_rows, num_kv_heads, group, head_dim, max_context_len, processors)
    pairs = num_rows * num_kv_heads
    few = pairs <= processors
    warps = 8 if few and head_dim <= 128 else 4
    heads_each = next((heads for heads in (1, 2) if pairs // heads <= 2 * processors and num_kv_heads % heads == 0), 4)
    while num_kv_heads % heads_each:
        heads_each //= 2
    wanted = -(-processors * (1 if few else 2) * heads_each // num_kv_heads)
    blocks = max(num_rows, min(wanted, num_rows * -(-max_context_len // _TILE) // _LEAST), 1)
    stages = 2 if head_dim > 128 else 4 if head_dim <= 64 and not few else 3
    how = Cut(heads_each, blocks, 24 if few else 32, warps, stages)
    return _fitting(how, num_rows, group, head_dim, key_bytes)


def _cut_fp8(num_rows: int, num_kv_heads: int, group: int, head_dim: int, max_context_len: int, processors: int) -> Cut:
    """Choose how to divide the work for keys of 8 bits: one block per multiprocessor.

    Two heads of 128 channels lie beside each other in 256 bytes of a token. More rows than blocks are divided at fewer places with four heads per block.
    """
    heads_each = (
        1 if num_rows * max_context_len < _SHORT_FP8 else 2 if num_rows * num_kv_heads <= _MANY_PAIRS_FP8 else 4
    )
    while num_kv_heads % heads_each:
        heads_each //= 2
    wanted = processors * heads_each // num_kv_heads
    blocks = max(1, min(wanted, num_rows * -(-max_context_len // _TILE) // _LEAST))
    return _fitting(Cut(heads_each, blocks, 24, 8 if head_dim <= 128 else 4, 4), num_rows, group, head_dim, key_bytes=1)


def _fitting(how: Cut, num_rows: int, group: int, head_dim: int, key_bytes: int) -> Cut:
    """Shorten the rings until a block's shared memory fits."""
    while how.stages > 1 and how.shared_bytes(num_rows, group, head_dim, key_bytes) > nvrtc.SHARED_BYTES:
        how = replace(how, stages=how.stages - 1)
    return how


def serves(
    q: Tensor, k_plane: Tensor, v_plane: Tensor, page_unit: int, num_rows: int, num_kv_heads: int, sinks: Tensor | None
) -> bool:
    """Return whether the kernel supports these operands."""
    head_dim, group = q.shape[2], q.shape[1] // num_kv_heads
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and (k_plane.dtype is q.dtype or (k_plane.dtype is torch.float8_e4m3fn and head_dim % 32 == 0))
        and head_dim in _HEAD_DIMS
        and group <= (8 if head_dim == 256 else 16)
        and num_rows <= _MAX_ROWS
        and page_unit * k_plane.element_size() % 16 == 0
        and (k_plane.data_ptr() | v_plane.data_ptr()) % 16 == 0
        and q.data_ptr() % 8 == 0
        and (sinks is None or sinks.dtype is q.dtype)
    )


def decode_attention(
    out: Tensor,
    q: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    page_unit: int,
    page_table: Tensor,
    row_slots: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tokens: int,
    num_kv_heads: int,
    scale: float,
    max_context_len: int,
    sliding_window: int,
    softcap: float,
    sinks: Tensor | None,
    scratch: Scratch | None,
    how: Cut | None = None,
) -> bool:
    """See runtime.engine.kernels.attention.paged_attention. Every row has one query or none.

    Returns False without any effect if this kernel does not support the operands.
    """
    num_rows, head_dim, group = row_slots.shape[0], q.shape[2], q.shape[1] // num_kv_heads
    key_bytes = k_plane.element_size()
    if scratch is None or (how is None and key_bytes == 2 and num_rows * num_kv_heads > MAX_PAIRS):
        return False
    if not serves(q, k_plane, v_plane, page_unit, num_rows, num_kv_heads, sinks):
        return False
    how = how or cut(num_rows, num_kv_heads, group, head_dim, max_context_len, _processors(q.device), key_bytes)
    shared_bytes = how.shared_bytes(num_rows, group, head_dim, key_bytes)
    if shared_bytes > nvrtc.SHARED_BYTES or not scratch.holds(
        2 * num_kv_heads * how.blocks * group * (head_dim + 4), num_rows * num_kv_heads
    ):
        return False
    if (compiled := module(q.device, head_dim, q.dtype, group, how, fp8=key_bytes == 1)) is None:
        return False
    tensors = (
        out,
        q,
        k_plane,
        v_plane,
        sinks,
        page_table,
        row_slots,
        query_starts,
        context_lens,
        scratch.partials,
        scratch.counters,
    )
    arguments = _Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        page_unit,
        page_table.stride(0),
        num_rows,
        num_kv_heads,
        group,
        how.heads_each,
        how.whole,
        block_tokens.bit_length() - 1,
        sliding_window,
        how.early,
        scale if softcap else scale * _LOG2E,
        softcap,
    )
    compiled.launch(NAME, (how.blocks, num_kv_heads // how.heads_each, 1), how.warps * 32, shared_bytes, arguments)
    return True
