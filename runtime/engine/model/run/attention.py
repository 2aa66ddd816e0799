"""The attention hook: what every layer of every model calls, whether it is Hugging Face's own code or a fused stack.

Keys and values of a step are written first, then its queries read them back through the pages, so prefill, chunks,
prefix hits and decode are one path.
"""

from typing import cast

import torch
from transformers import AttentionInterface

from runtime.engine.kernels.attention import paged_attention
from runtime.engine.kernels.rope import rope_and_cache
from runtime.engine.kernels.rope import write_kv as write_kv_kernel
from runtime.engine.model.cpu.attention import attend_on_host, rope_write_on_host, write_on_host
from runtime.engine.model.cpu.attention_plan import AttentionPlan
from runtime.engine.model.run.step import AttentionSpec, RopeSpec, StepContext

IMPLEMENTATION = "repertory"


def register() -> None:
    """Make the hook known to transformers as attn_implementation="repertory". It has no mask function, so transformers builds no masks."""
    AttentionInterface.register(IMPLEMENTATION, hook)


def hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: StepContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface: query [1, Hq, T, D], key and value [1, Hkv, T, D] → ([1, T, Hq, D], None)."""
    del attention_mask, unused
    head_dim = query.shape[3]
    layer = cast("int", module.layer_idx)
    spec = AttentionSpec(
        layer,
        query.shape[1],
        key.shape[1],
        head_dim,
        head_dim**-0.5 if scaling is None else float(scaling),
        sliding_window or 0,
        softcap or 0.0,
    )
    write_kv(step, spec, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attend(step, spec, query[0].transpose(0, 1), sinks=s_aux)[None], None


def write_kv(step: StepContext, spec: AttentionSpec, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write `k` and `v` [T, Hkv, D] into the layer's planes."""
    planes = step.planes[spec.layer]
    if k.is_cuda:
        write_kv_kernel(k, v, step.slots, planes.k, planes.v)
    else:
        write_on_host(k, v, step.slots, planes)


def attend(
    step: StepContext,
    spec: AttentionSpec,
    q: torch.Tensor,
    out: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute causal attention of `q` [T, Hq, D] over each row's pages into `out` [T, Hq, D]. The step's keys and values must be written."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    planes = step.planes[spec.layer]
    if not q.is_cuda:
        if step.host is None:
            step.host = AttentionPlan(
                step.page_table, step.row_slots, step.query_starts, step.context_lens, step.block_tokens
            )
        attend_on_host(step.host, planes, step.block_tokens, spec, q, out, sinks)
        return out
    paged_attention(
        out,
        q.contiguous(),
        planes.k,
        planes.v,
        planes.page_unit,
        step.page_table,
        step.row_slots,
        step.query_starts,
        step.context_lens,
        block_tokens=step.block_tokens,
        num_kv_heads=spec.num_kv_heads,
        scale=spec.scale,
        max_query_len=step.max_query_len,
        max_context_len=step.max_context_len,
        sliding_window=spec.sliding_window,
        softcap=spec.softcap,
        sinks=sinks,
        scratch=step.scratch,
    )
    return out


def rope_write(
    step: StepContext,
    spec: AttentionSpec,
    rope: RopeSpec,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """Split `qkv` [T, (Hq + 2·Hkv)·D], normalise and rotate the heads, and write K and V. Returns q [T, Hq, D].

    `cos` and `sin` are [T, rotary_dim / 2 or more].
    """
    planes = step.planes[spec.layer]
    if not qkv.is_cuda:
        return rope_write_on_host(qkv, cos, sin, step.slots, planes, spec, rope, q_norm, k_norm)
    q = torch.empty((qkv.shape[0], spec.num_q_heads, spec.head_dim), dtype=qkv.dtype, device=qkv.device)
    rope_and_cache(
        q,
        qkv,
        cos,
        sin,
        step.slots,
        planes.k,
        planes.v,
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotary_dim=rope.rotary_dim,
        interleaved=rope.interleaved,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=rope.norm_eps,
        norm_plus_one=rope.norm_plus_one,
    )
    return q
