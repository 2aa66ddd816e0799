"""QK-norm, rotary embedding and KV write in one kernel, and the KV write alone, in Triton, with one program per token
and group of heads.
"""

import triton
import triton.language as tl
from torch import Tensor

from runtime.engine.kernels.gpu import pdl


@triton.jit
def _head_norm(x, partner, weight_ptr, dims, partners, mask, eps, HEAD_DIM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """RMS-normalise rows of heads. `partner` holds the same rows in another order, with the same sum of squares."""
    weight = tl.load(weight_ptr + dims, mask=mask, other=0.0)
    partner_weight = tl.load(weight_ptr + partners, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / HEAD_DIM + eps)[:, None]
    if PLUS_ONE:
        y = wide * scale * (1.0 + weight.to(tl.float32))[None, :]
        z = partner.to(tl.float32) * scale * (1.0 + partner_weight.to(tl.float32))[None, :]
    else:
        y = (wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
        z = (partner.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * partner_weight.to(tl.float32)[None, :]
    return y.to(x.dtype), z.to(x.dtype)


@triton.jit
def _rope_kernel(
    q_out_ptr,
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    k_plane_ptr,
    v_plane_ptr,
    q_norm_ptr,
    k_norm_ptr,
    qkv_stride,
    cos_stride,
    freq_stride,
    norm_eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin(PDL)
    pdl.wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    in_dim = dims < HEAD_DIM
    is_q = part < Q_BLOCKS
    is_k = (part >= Q_BLOCKS) & (part < Q_BLOCKS + KV_BLOCKS)
    slot = tl.load(slots_ptr + token)
    if is_q:
        first = part * BLOCK_H
        num_heads = Q_HEADS
        offset = 0
    else:
        if slot < 0:
            return
        num_heads = KV_HEADS
        if is_k:
            first = (part - Q_BLOCKS) * BLOCK_H
            offset = Q_HEADS * HEAD_DIM
        else:
            first = (part - Q_BLOCKS - KV_BLOCKS) * BLOCK_H
            offset = (Q_HEADS + KV_HEADS) * HEAD_DIM
    heads = first + tl.arange(0, BLOCK_H)
    mask = (heads < num_heads)[:, None] & in_dim[None, :]
    rows = qkv_ptr + token * qkv_stride + offset + heads[:, None] * HEAD_DIM
    x = tl.load(rows + dims[None, :], mask=mask, other=0.0)
    place = heads[:, None] * HEAD_DIM + dims[None, :]
    if is_q or is_k:
        HALF: tl.constexpr = ROTARY_DIM // 2
        turned = dims < ROTARY_DIM
        if INTERLEAVED:
            partners = tl.where(turned, dims ^ 1, dims)
            freqs = dims // 2
            is_first = dims % 2 == 0
        else:
            is_first = dims < HALF
            partners = tl.where(turned, tl.where(is_first, dims + HALF, dims - HALF), dims)
            freqs = tl.where(is_first, dims, dims - HALF)
        y = tl.load(rows + partners[None, :], mask=mask, other=0.0)
        if NORM:
            norm_ptr = q_norm_ptr if is_q else k_norm_ptr
            x, y = _head_norm(x, y, norm_ptr, dims, partners, in_dim, norm_eps, HEAD_DIM, PLUS_ONE)
        c = tl.load(cos_ptr + token * cos_stride + freqs * freq_stride, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin_ptr + token * cos_stride + freqs * freq_stride, mask=turned, other=0.0).to(tl.float32)
        s = tl.where(is_first, -s, s)
        x = (x.to(tl.float32) * c[None, :] + y.to(tl.float32) * s[None, :]).to(x.dtype)
    if is_q:
        tl.store(q_out_ptr + token * (Q_HEADS * HEAD_DIM) + place, x, mask=mask)
    else:
        plane_ptr = k_plane_ptr if is_k else v_plane_ptr
        tl.store(plane_ptr + slot + place, x.to(plane_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _write_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    k_plane_ptr,
    v_plane_ptr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads < KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    place = heads[:, None] * HEAD_DIM + dims[None, :]
    k = tl.load(k_ptr + token * k_token_stride + heads[:, None] * k_head_stride + dims[None, :], mask=mask, other=0.0)
    v = tl.load(v_ptr + token * v_token_stride + heads[:, None] * v_head_stride + dims[None, :], mask=mask, other=0.0)
    tl.store(k_plane_ptr + slot + place, k.to(k_plane_ptr.dtype.element_ty), mask=mask)
    tl.store(v_plane_ptr + slot + place, v.to(v_plane_ptr.dtype.element_ty), mask=mask)


def rope_and_cache(
    q_out: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    norm_plus_one: bool,
) -> None:
    """See runtime.engine.kernels.rope.rope_and_cache."""
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    if cos.stride() != sin.stride() or not q_out.is_contiguous():
        raise ValueError(
            f"rope_and_cache: cos and sin must be laid out alike, {cos.stride()} and {sin.stride()}, and q_out contiguous"
        )
    block_h = 4 if num_tokens <= 256 else 8
    grid = (num_tokens, triton.cdiv(num_q_heads, block_h) + 2 * triton.cdiv(num_kv_heads, block_h))
    _rope_kernel[grid](
        q_out,
        qkv,
        cos,
        sin,
        slots,
        k_plane,
        v_plane,
        q_norm if q_norm is not None else qkv,
        k_norm if k_norm is not None else qkv,
        qkv.stride(0),
        cos.stride(0),
        cos.stride(1),
        norm_eps,
        Q_HEADS=num_q_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=interleaved,
        NORM=q_norm is not None,
        PLUS_ONE=norm_plus_one,
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(head_dim),
        PDL=pdl.overlaps(qkv),
        num_warps=1 if block_h * head_dim <= 512 else 2,
        **pdl.options(qkv),
    )


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
) -> None:
    """See runtime.engine.kernels.rope.write_kv."""
    num_tokens, num_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    block_h = min(8, triton.next_power_of_2(num_heads))
    _write_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        k,
        v,
        slots,
        k_plane,
        v_plane,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        KV_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=2,
    )
