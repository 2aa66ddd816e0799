"""Attention of a packed batch over paged keys and values of one layer.

Where a token's K is stored:

    page_table[row_slots[b], t // block_tokens] = p          (t: position in the row)
    k_plane[p * page_unit + (t % block_tokens) * Hkv * D + h * D + d]

Host arguments (`max_*`) only choose the code path and the grid. Every count that matters is read from device memory,
so one CUDA graph serves any smaller batch: a padded row has no query tokens.
"""

import torch
from torch import Tensor

from runtime.engine.kernels.scratch import Scratch


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
    *,
    block_tokens: int,
    num_kv_heads: int,
    scale: float,
    max_query_len: int,
    max_context_len: int,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Compute causal attention of `q` [T, Hq, D] into `out` [T, Hq, D]. Tokens that belong to no row are not written.

    Args:
        query_starts: [B+1] int32. The queries of row b are tokens starts[b] to starts[b+1] - 1.
        context_lens: [B] int32, counted after this step's keys and values were written. The last query of row b is at
            position context_lens[b] - 1.
        page_table: [R, W] int32, indexed by `row_slots` [B] int32.
        block_tokens: a power of two, at least 16.
        max_query_len, max_context_len: upper bounds over the rows of the batch.
        sliding_window: number of positions that a token sees, itself included. 0 means all.
        softcap: if not 0, scores become softcap · tanh(score / softcap).
        sinks: [Hq], a logit per head that takes part in the softmax and has no value.
    """
    arguments = (
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
        max_query_len,
        max_context_len,
        sliding_window,
        softcap,
        sinks,
        scratch,
    )
    if q.is_cuda:
        from runtime.engine.kernels.gpu import attention

        attention.paged_attention(*arguments)
    else:
        paged_attention_torch(*arguments)


def paged_attention_torch(
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
    """Torch twin of the Triton launch: row by row, in float32."""
    del max_query_len, max_context_len, scratch
    num_heads, head_dim = q.shape[1:]
    group = num_heads // num_kv_heads
    k_pages = _pages(k_plane, page_unit, block_tokens, num_kv_heads, head_dim)
    v_pages = _pages(v_plane, page_unit, block_tokens, num_kv_heads, head_dim)
    starts, lengths, slots = query_starts.tolist(), context_lens.tolist(), row_slots.tolist()
    for start, end, length, slot in zip(starts, starts[1:], lengths, slots, strict=False):
        num_queries = end - start
        if num_queries <= 0 or length <= 0:
            continue
        pages = page_table[slot, : -(-length // block_tokens)].long()
        k = _heads_first(k_pages[pages], length)
        v = _heads_first(v_pages[pages], length)
        queries = q[start:end].float().view(num_queries, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        scores = (queries.reshape(num_kv_heads, group * num_queries, head_dim) @ k.transpose(1, 2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.view(num_kv_heads, group, num_queries, length)
        if num_queries > 1 or (sliding_window and sliding_window < length):
            position = torch.arange(length - num_queries, length, device=q.device)[:, None]
            key = torch.arange(length, device=q.device)[None, :]
            hidden = key > position
            if sliding_window:
                hidden = hidden | (position - key >= sliding_window)
            scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(num_kv_heads, group, 1, 1).expand(-1, -1, num_queries, 1)
            weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        mixed = weights.reshape(num_kv_heads, group * num_queries, length) @ v
        out[start:end] = mixed.view(num_heads, num_queries, head_dim).transpose(0, 1).to(out.dtype)


def _pages(plane: Tensor, page_unit: int, block_tokens: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """View the plane as [pages, block_tokens, Hkv, D]. The last page may end before its unit does."""
    block = block_tokens * num_kv_heads * head_dim
    num_pages = (plane.numel() - block) // page_unit + 1
    return plane.as_strided(
        (num_pages, block_tokens, num_kv_heads, head_dim), (page_unit, num_kv_heads * head_dim, head_dim, 1)
    )


def _heads_first(pages: Tensor, length: int) -> Tensor:
    return pages.flatten(0, 1)[:length].float().transpose(0, 1)
