"""Launches paged attention on a GPU: CUDA C++ for decode where it applies (`attention_cuda.py`), otherwise Triton."""

import torch
import triton
from torch import Tensor

from runtime.engine.kernels.gpu import attention_cuda, pdl
from runtime.engine.kernels.gpu.attention_triton import decode_kernel, mixed_kernel
from runtime.engine.kernels.gpu.dot import precision
from runtime.engine.kernels.scratch import Scratch

_LOG2E = 1.4426950408889634


def num_key_splits(
    num_rows: int, num_kv_heads: int, max_context_len: int, num_processors: int, split_tokens: int = 128
) -> int:
    """Return how many programs share one row's keys.

    Each multiprocessor gets about four programs, and a program at least `split_tokens` keys.
    """
    wanted = -(-4 * num_processors // max(num_rows * num_kv_heads, 1))
    return max(1, min(wanted, -(-max_context_len // split_tokens), 64))


def decode_tiling(wide: bool, block_d: int, num_rows: int) -> tuple[int, int, int]:
    """Return (keys per iteration, warps, stages) from the measurements in docs/benchmarks/linear.md."""
    if wide or block_d > 128:
        return 32, 4, 2
    return (128, 4, 3) if num_rows <= 16 else (64, 2, 3)


def mixed_tiling(wide: bool, block_d: int) -> tuple[int, int, int, int]:
    """Return (query rows, keys per iteration, warps, stages), likewise."""
    if wide:
        return 32, 32, 4, 1
    return (64, 64, 4, 2) if block_d <= 64 else (128, 32, 4, 2) if block_d == 128 else (64, 32, 4, 2)


def paged_attention(
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
    max_query_len: int,
    max_context_len: int,
    sliding_window: int,
    softcap: float,
    sinks: Tensor | None,
    scratch: Scratch | None,
) -> None:
    """See runtime.engine.kernels.attention.paged_attention."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows = row_slots.shape[0]
    if num_tokens == 0 or num_rows == 0:
        return
    if max_query_len == 1 and attention_cuda.decode_attention(
        out,
        q,
        k_plane,
        v_plane,
        page_unit,
        page_table,
        row_slots,
        query_starts,
        context_lens,
        block_tokens,
        num_kv_heads,
        scale,
        max_context_len,
        sliding_window,
        softcap,
        sinks,
        scratch,
    ):
        return
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    wide = q.element_size() == 4
    # A soft cap applies to the plain score, so the conversion to base two comes later.
    score_scale = scale if softcap else scale * _LOG2E
    arrays = (
        out,
        q,
        k_plane,
        v_plane,
        page_unit,
        page_table,
        page_table.stride(0),
        row_slots,
        query_starts,
        context_lens,
        score_scale,
        softcap,
        sliding_window,
        sinks if sinks is not None else q,
    )
    if max_query_len == 1:
        tile, num_warps, num_stages = decode_tiling(wide, block_d, num_rows)
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
        block_m = max(16, triton.next_power_of_2(group))
        splits = num_key_splits(num_rows, num_kv_heads, max_context_len, processors, tile)
        pairs = num_rows * num_kv_heads
        if splits > 1:
            elements = pairs * splits * block_m * (block_d + 2)
            if scratch is None:
                scratch = Scratch.allocate(q.device, partial_elements=elements, num_counters=pairs)
            elif not scratch.holds(elements, pairs):
                splits = 1
        decode_kernel[(num_kv_heads, num_rows, splits)](
            *arrays,
            scratch.partials if scratch is not None else q,
            scratch.counters if scratch is not None else q,
            splits,
            GROUP=group,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_TOKENS=block_tokens,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            TILE=tile,
            SPLIT=splits > 1,
            WINDOW=sliding_window > 0,
            SOFTCAP=softcap > 0,
            SINKS=sinks is not None,
            PRECISION=precision(q),
            num_warps=num_warps,
            num_stages=num_stages,
            PDL=pdl.overlaps(q),
            **pdl.options(q),
        )
        return
    block_m, tile, num_warps, num_stages = mixed_tiling(wide, block_d)
    block_m = max(block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    num_blocks = num_tokens // block_q + num_rows
    mixed_kernel[(num_blocks, num_kv_heads)](
        *arrays,
        num_rows,
        GROUP=group,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        TILE=tile,
        WINDOW=sliding_window > 0,
        SOFTCAP=softcap > 0,
        SINKS=sinks is not None,
        PRECISION=precision(q),
        num_warps=num_warps,
        num_stages=num_stages,
        PDL=pdl.overlaps(q),
        **pdl.options(q),
    )
