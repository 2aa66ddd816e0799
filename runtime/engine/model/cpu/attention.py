"""Computes attention and KV writes on a CPU: pages are gathered (or viewed in place) for a tile of rows and passed to
torch's own attention.

The torch twin in `kernels.attention` states the same computation plainly and serves as the reference.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from runtime.engine.kernels.norm import rms_norm
from runtime.engine.model.cpu.attention_plan import AttentionPlan, Tile
from runtime.engine.model.run.step import AttentionSpec, KvPlanes, RopeSpec


def write_on_host(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, planes: KvPlanes) -> None:
    """Write `k` and `v` [T, Hkv, D] at element offsets `slots` [T] (all ≥ 0: a CPU step has no padding)."""
    width = k.shape[1] * k.shape[2]
    for x, plane in ((k, planes.k), (v, planes.v)):
        # Every element starts an (overlapping) row of this view, so that a slot is a row index.
        rows = plane.as_strided((plane.numel() - width + 1, width), (1, 1))
        values = x.reshape(-1, width).to(plane.dtype)
        if plane.element_size() == 1:  # FP8 has no index_copy
            rows, values = rows.view(torch.uint8), values.view(torch.uint8)
        rows.index_copy_(0, slots, values)


def rope_write_on_host(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    planes: KvPlanes,
    spec: AttentionSpec,
    rope: RopeSpec,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> torch.Tensor:
    """Do what `kernels.rope.rope_and_cache` does in few passes: queries and keys are rotated together.

    Returns q [T, Hq, D], a view.
    """
    heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
    num_turning = spec.num_q_heads + spec.num_kv_heads
    turning = heads[:, :num_turning]
    if q_norm is not None and k_norm is not None:
        q, k = turning.split((spec.num_q_heads, spec.num_kv_heads), 1)
        turning = torch.cat(
            (
                rms_norm(q, q_norm, rope.norm_eps, rope.norm_plus_one),
                rms_norm(k, k_norm, rope.norm_eps, rope.norm_plus_one),
            ),
            1,
        )
    half = rope.rotary_dim // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    wide = turning.float()
    turned = torch.empty(wide.shape, dtype=torch.float32)
    first = slice(0, rope.rotary_dim, 2) if rope.interleaved else slice(0, half)
    second = slice(1, rope.rotary_dim, 2) if rope.interleaved else slice(half, rope.rotary_dim)
    a, b = wide[..., first], wide[..., second]
    torch.mul(a, c, out=turned[..., first]).addcmul_(b, s, value=-1)
    torch.mul(b, c, out=turned[..., second]).addcmul_(a, s)
    if rope.rotary_dim < spec.head_dim:
        turned[..., rope.rotary_dim :] = wide[..., rope.rotary_dim :]
    turned = turned.to(qkv.dtype)
    write_on_host(turned[:, spec.num_q_heads :], heads[:, num_turning:], slots, planes)
    return turned[:, : spec.num_q_heads]


def attend_on_host(
    plan: AttentionPlan,
    planes: KvPlanes,
    block_tokens: int,
    spec: AttentionSpec,
    q: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Compute attention of `q` [T, Hq, D] into `out` [T, Hq, D]."""
    for tile in plan.tiles(spec.sliding_window, q.dtype):
        k = _keys(planes.k, planes.page_unit, tile, block_tokens, spec, q.dtype)
        v = _keys(planes.v, planes.page_unit, tile, block_tokens, spec, q.dtype)
        if tile.num_queries == 1 and sinks is None and not spec.softcap:
            # Heads that share keys become queries of one head: torch reads (and in bf16 repacks) the keys once, not per head.
            queries = q[tile.tokens].view(tile.num_rows, spec.num_kv_heads, -1, spec.head_dim)
            out[tile.tokens] = scaled_dot_product_attention(
                queries, k, v, attn_mask=tile.bias, scale=spec.scale
            ).flatten(1, 2)
            continue
        queries = q[tile.tokens].view(tile.num_rows, tile.num_queries, spec.num_q_heads, spec.head_dim).transpose(1, 2)
        if sinks is None and not spec.softcap:
            mixed = scaled_dot_product_attention(
                queries,
                k,
                v,
                attn_mask=tile.bias,
                is_causal=tile.causal,
                scale=spec.scale,
                enable_gqa=spec.num_q_heads != spec.num_kv_heads,
            )
        else:
            mixed = _written_out(tile, spec, queries, k, v, sinks)
        out[tile.tokens] = mixed.transpose(1, 2).reshape(-1, spec.num_q_heads, spec.head_dim)


def _keys(
    plane: torch.Tensor, page_unit: int, tile: Tile, block_tokens: int, spec: AttentionSpec, dtype: torch.dtype
) -> torch.Tensor:
    """Return the tile's keys, or values: [num_rows, Hkv, length, D]."""
    width = spec.num_kv_heads * spec.head_dim
    block = block_tokens * width
    if tile.page_step == -1 or tile.page_step * page_unit == block:  # The pages are adjacent: no copy is needed.
        begin = plane.storage_offset() + tile.first_page * page_unit
        seen = plane.as_strided((1, tile.length, spec.num_kv_heads, spec.head_dim), (0, width, spec.head_dim, 1), begin)
    else:
        blocks = plane.as_strided(((plane.numel() - block) // page_unit + 1, block), (page_unit, 1))
        if plane.element_size() == 1:  # FP8 has no index_select
            gathered = blocks.view(torch.uint8).index_select(0, tile.pages).view(plane.dtype)
        else:
            # With `out`, index_select copies whole blocks. Without, it copies such a view element by element.
            gathered = torch.index_select(blocks, 0, tile.pages, out=plane.new_empty((tile.pages.numel(), block)))
        seen = gathered.view(tile.num_rows, -1, spec.num_kv_heads, spec.head_dim)[:, : tile.length]
    return seen.to(dtype).transpose(1, 2)


def _written_out(
    tile: Tile, spec: AttentionSpec, queries: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Compute attention with soft-capped scores or sinks, which torch lacks: [num_rows, Hq, num_queries, D]."""
    group = spec.num_q_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (queries @ k.transpose(2, 3)).float() * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if tile.bias is not None:
        scores = scores + tile.bias
    elif tile.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return weights.to(v.dtype) @ v
