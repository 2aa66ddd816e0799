"""Paged attention in Triton: one kernel for decode with split keys and one for mixed and prefill batches, with a shared
inner loop.

A program owns BLOCK_M query rows of one KV head: the heads that share it, for one token (decode) or several (mixed).
With split keys the last program of a row to finish merges the parts in their order, so that the sum does not depend on
the order of completion.
"""

import triton
import triton.language as tl

from runtime.engine.kernels.gpu import pdl
from runtime.engine.kernels.gpu.dot import dot, dot_add


@triton.jit
def _as_operand(q, k_plane_ptr):
    """Return queries in the type in which they are multiplied with keys.

    For keys of 8 bits that is fp16, which holds every e4m3 value: one instruction converts two keys to it, several one to bf16. A query beyond
    fp16's range becomes its largest number.
    """
    if k_plane_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype.primitive_bitwidth == 16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit
def _attend(
    q,
    begin,
    end,
    q_pos,
    row_mask,
    table_row,
    k_plane_ptr,
    v_plane_ptr,
    page_unit,
    head_offset,
    scale,
    softcap,
    window,
    acc,
    m,
    total,
    KV_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys begin..end into the running softmax (acc, m, total). Scores are exponents of two.

    `begin` is a multiple of TILE.
    """
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < HEAD_DIM
    for start in range(begin, end, TILE):
        keys = start + tl.arange(0, TILE)
        valid = keys < end
        pages = tl.load(table_row + keys // BLOCK_TOKENS, mask=valid, other=0).to(tl.int64)
        tokens = pages * page_unit + (keys % BLOCK_TOKENS) * KV_STRIDE + head_offset
        if BLOCK_D == HEAD_DIM:
            k = tl.load(k_plane_ptr + tokens[None, :] + dims[:, None], mask=valid[None, :], other=0.0)
            v = tl.load(v_plane_ptr + tokens[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
        else:
            k = tl.load(k_plane_ptr + tokens[None, :] + dims[:, None], mask=valid[None, :] & in_dim[:, None], other=0.0)
            v = tl.load(v_plane_ptr + tokens[:, None] + dims[None, :], mask=valid[:, None] & in_dim[None, :], other=0.0)
        scores = dot(q, k.to(q.dtype), PRECISION) * scale
        if SOFTCAP:
            capped = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
            scores = capped * 1.4426950408889634
        seen = valid[None, :] & row_mask[:, None]
        if CAUSAL:
            seen = seen & (keys[None, :] <= q_pos[:, None])
        if WINDOW:
            seen = seen & (q_pos[:, None] - keys[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - m_safe[:, None])
        fade = tl.exp2(m - m_safe)
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None]
        acc = dot_add(p.to(q.dtype), v.to(q.dtype), acc, PRECISION)
        m = m_new
    return acc, m, total


@triton.jit
def _start_sinks(sinks_ptr, heads, row_mask, SINKS: tl.constexpr, BLOCK_M: tl.constexpr):
    if SINKS:
        m = tl.load(sinks_ptr + heads, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    return m, total


@triton.jit(do_not_specialize=["table_stride", "window", "num_splits"])
def decode_kernel(
    out_ptr,
    q_ptr,
    k_plane_ptr,
    v_plane_ptr,
    page_unit,
    table_ptr,
    table_stride,
    row_slots_ptr,
    starts_ptr,
    lens_ptr,
    scale,
    softcap,
    window,
    sinks_ptr,
    partials_ptr,
    counters_ptr,
    num_splits,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    pdl.wait(PDL)
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    # These loads come before any branch, because their latencies would add up at few rows.
    token = tl.load(starts_ptr + row).to(tl.int64)
    next_token = tl.load(starts_ptr + row + 1)
    length = tl.load(lens_ptr + row)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    if next_token <= token:
        return
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0) // TILE * TILE
    num_tiles = tl.cdiv(length - first, TILE)
    tiles_each = num_tiles
    if SPLIT:
        # One iteration per part while there are few parts. Merging many costs more than it saves.
        tiles_each = tl.maximum(tl.cdiv(num_tiles, num_splits), tl.minimum(tl.cdiv(num_tiles, 16), 4))
    begin = first + split * tiles_each * TILE
    if begin >= length:
        return
    end = tl.minimum(begin + tiles_each * TILE, length)

    rows = tl.arange(0, BLOCK_M)
    row_mask = rows < GROUP
    heads = kv_head * GROUP + rows
    dims = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    place = token * (KV_HEADS * GROUP * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
    q = _as_operand(tl.load(q_ptr + place, mask=mask, other=0.0), k_plane_ptr)
    m, total = _start_sinks(sinks_ptr, heads, row_mask & (split == 0), SINKS, BLOCK_M)
    if SINKS:
        m = tl.where(split == 0, m, float("-inf"))
        total = tl.where(split == 0, total, 0.0)
    q_pos = tl.zeros((BLOCK_M,), tl.int32) + (length - 1)
    acc, m, total = _attend(
        q,
        begin,
        end,
        q_pos,
        row_mask,
        table_ptr + slot * table_stride,
        k_plane_ptr,
        v_plane_ptr,
        page_unit,
        kv_head * HEAD_DIM,
        scale,
        softcap,
        window,
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32),
        m,
        total,
        KV_HEADS * HEAD_DIM,
        HEAD_DIM,
        BLOCK_TOKENS,
        BLOCK_D,
        TILE,
        WINDOW,
        SOFTCAP,
        False,
        PRECISION,
    )
    if SPLIT:
        parts = tl.cdiv(num_tiles, tiles_each)
        if parts > 1:
            pair = row * KV_HEADS + kv_head
            PART: tl.constexpr = BLOCK_M * (BLOCK_D + 2)
            base = partials_ptr + (pair.to(tl.int64) * num_splits + split) * PART
            cells = rows[:, None] * BLOCK_D + dims[None, :]
            tl.store(base + cells, acc, mask=mask)
            tl.store(base + BLOCK_M * BLOCK_D + rows, m)
            tl.store(base + BLOCK_M * (BLOCK_D + 1) + rows, total)
            tl.debug_barrier()
            arrived = tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel", scope="gpu")
            if arrived < parts - 1:
                return
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            base = partials_ptr + pair.to(tl.int64) * num_splits * PART
            for _ in range(parts):
                m_part = tl.load(base + BLOCK_M * BLOCK_D + rows, cache_modifier=".cg")
                total_part = tl.load(base + BLOCK_M * (BLOCK_D + 1) + rows, cache_modifier=".cg")
                acc_part = tl.load(base + cells, mask=mask, other=0.0, cache_modifier=".cg")
                m_new = tl.maximum(m, m_part)
                m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                fade = tl.exp2(m - m_safe)
                fade_part = tl.exp2(m_part - m_safe)
                acc = acc * fade[:, None] + acc_part * fade_part[:, None]
                total = total * fade + total_part * fade_part
                m = m_new
                base += PART
            tl.store(counters_ptr + pair, 0)
    y = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_stride", "window", "num_rows"])
def mixed_kernel(
    out_ptr,
    q_ptr,
    k_plane_ptr,
    v_plane_ptr,
    page_unit,
    table_ptr,
    table_stride,
    row_slots_ptr,
    starts_ptr,
    lens_ptr,
    scale,
    softcap,
    window,
    sinks_ptr,
    num_rows,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    pdl.wait(PDL)
    # Row b owns query blocks from starts[b] // BLOCK_Q + b on. At most one block per row is wasted, and the host needs no counts.
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    row = low - 1
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start
    first_query = (block - (start // BLOCK_Q + row)) * BLOCK_Q
    if first_query >= num_queries:
        return
    length = tl.load(lens_ptr + row)

    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP
    row_mask = (rows < BLOCK_Q * GROUP) & (queries < num_queries)
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (dims < HEAD_DIM)[None, :]
    place = ((start + queries).to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM) + heads * HEAD_DIM)[:, None] + dims[None, :]
    q = _as_operand(tl.load(q_ptr + place, mask=mask, other=0.0), k_plane_ptr)
    q_pos = length - num_queries + queries

    lowest = length - num_queries + first_query
    end = tl.minimum(lowest + BLOCK_Q, length)
    begin = 0
    if WINDOW:
        begin = tl.maximum(lowest - window + 1, 0) // TILE * TILE
    m, total = _start_sinks(sinks_ptr, heads, row_mask, SINKS, BLOCK_M)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    table_row = table_ptr + slot * table_stride
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    diagonal = begin
    if not WINDOW:
        # Tiles that all queries of the block see completely need no causal mask.
        diagonal = tl.maximum((lowest + 1) // TILE * TILE, begin)
        acc, m, total = _attend(
            q,
            begin,
            diagonal,
            q_pos,
            row_mask,
            table_row,
            k_plane_ptr,
            v_plane_ptr,
            page_unit,
            kv_head * HEAD_DIM,
            scale,
            softcap,
            window,
            acc,
            m,
            total,
            KV_HEADS * HEAD_DIM,
            HEAD_DIM,
            BLOCK_TOKENS,
            BLOCK_D,
            TILE,
            WINDOW,
            SOFTCAP,
            False,
            PRECISION,
        )
    acc, m, total = _attend(
        q,
        diagonal,
        end,
        q_pos,
        row_mask,
        table_row,
        k_plane_ptr,
        v_plane_ptr,
        page_unit,
        kv_head * HEAD_DIM,
        scale,
        softcap,
        window,
        acc,
        m,
        total,
        KV_HEADS * HEAD_DIM,
        HEAD_DIM,
        BLOCK_TOKENS,
        BLOCK_D,
        TILE,
        WINDOW,
        SOFTCAP,
        True,
        PRECISION,
    )
    y = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)
