"""Normalises queries and keys, applies the rotary embedding and writes keys and values into the KV cache, in one pass
over a fused QKV row.

Of a head of size D the first R = `rotary_dim` elements are rotated. In halves (NeoX), element d < R/2 pairs with
d + R/2 at frequency d. Interleaved, elements 2i and 2i + 1 pair at frequency i. `cos` and `sin` hold frequency f in
column f: the [T, R] table of two halves that transformers returns works as it is, and a table that holds each frequency
twice in a row works as `cos[:, ::2]`.
"""

import torch
from torch import Tensor


def rope_and_cache(
    q_out: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_plus_one: bool = False,
) -> None:
    """Split `qkv` [T, (Hq + 2·Hkv)·D] into heads, rotate queries into `q_out` [T, Hq, D] and write keys and values.

    `slots` [T] int64 is the element offset of a token's [Hkv, D] block in both planes; -1 writes nothing (padding).
    `q_norm` and `k_norm` [D] are RMSNorm weights that are applied to each head.
    """
    arguments = (
        q_out,
        qkv,
        cos,
        sin,
        slots,
        k_plane,
        v_plane,
        num_q_heads,
        num_kv_heads,
        head_dim,
        rotary_dim,
        interleaved,
        q_norm,
        k_norm,
        norm_eps,
        norm_plus_one,
    )
    if qkv.is_cuda:
        from runtime.engine.kernels.gpu import rope

        rope.rope_and_cache(*arguments)
    else:
        rope_and_cache_torch(*arguments)


def write_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
) -> None:
    """Write `k` and `v` [T, Hkv, D] (each head contiguous) at `slots` [T] of their planes, like `rope_and_cache`."""
    if k.is_cuda:
        from runtime.engine.kernels.gpu import rope

        rope.write_kv(k, v, slots, k_plane, v_plane)
    else:
        write_kv_torch(k, v, slots, k_plane, v_plane)


def rope_and_cache_torch(
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
    """Torch twin of the Triton launch."""
    heads = qkv.view(qkv.shape[0], num_q_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    q = _rotated(_normed(q, q_norm, norm_eps, norm_plus_one), cos, sin, rotary_dim, interleaved)
    k = _rotated(_normed(k, k_norm, norm_eps, norm_plus_one), cos, sin, rotary_dim, interleaved)
    q_out.copy_(q)
    write_kv_torch(k.to(qkv.dtype), v, slots, k_plane, v_plane)


def write_kv_torch(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_plane: Tensor,
    v_plane: Tensor,
) -> None:
    """Torch twin of the Triton launch."""
    kept = slots >= 0
    width = k.shape[1] * k.shape[2]
    where = slots[kept, None] + torch.arange(width, device=slots.device)
    for x, plane in ((k, k_plane), (v, v_plane)):
        plane[where] = x[kept].reshape(-1, width).to(plane.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool) -> Tensor:
    if weight is None:
        return x.float()
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (wide * (1.0 + weight.float())).to(x.dtype).float()
    return (weight * wide.to(x.dtype)).float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    half = rotary_dim // 2
    c, s = cos[:, None, :half].float(), sin[:, None, :half].float()
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return torch.cat((turned, passed), dim=-1)
