"""Rotary embedding and the KV write: the Triton kernels against their twins, the twins against transformers' own modules."""

from typing import Any

import pytest
import torch
from transformers import Cohere2Config, LlamaConfig, Qwen3Config
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from runtime.engine.kernels import rope
from runtime.engine.kernels.gpu import rope as gpu


def _tables(num_tokens: int, rotary_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(num_tokens, rotary_dim // 2, device=device) * 6
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize(
    ("dtype", "q_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "norm", "plus_one", "fp8"),
    [
        (torch.float32, 4, 2, 16, 16, False, False, False, False),
        (torch.float32, 6, 2, 80, 32, False, True, False, False),
        (torch.bfloat16, 3, 3, 96, 96, True, False, False, False),
        (torch.float16, 5, 1, 64, 64, False, True, True, False),
        (torch.bfloat16, 4, 2, 128, 64, True, True, True, False),
        (torch.float32, 4, 2, 16, 16, False, False, False, True),
    ],
)
def test_kernel_equals_twin(
    device: torch.device,
    dtype: torch.dtype,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    norm: bool,
    plus_one: bool,
    fp8: bool,
) -> None:
    num_tokens = 5
    qkv = torch.randn(num_tokens, (q_heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    cos, sin = (table.to(dtype) for table in _tables(num_tokens, rotary_dim, device))
    width = kv_heads * head_dim
    slots = torch.tensor([3 * width, -1, 0, 7 * width, -1], device=device)
    q_norm, k_norm = (torch.rand(2, head_dim, device=device) + 0.5).to(dtype) if norm else (None, None)
    plane_dtype = torch.float8_e4m3fn if fp8 else dtype
    results = []
    for run in (gpu.rope_and_cache, rope.rope_and_cache_torch):
        q_out = qkv.new_full((num_tokens, q_heads, head_dim), torch.nan)
        planes = torch.zeros(2, 9 * width, device=device).to(plane_dtype)
        run(
            q_out,
            qkv,
            cos,
            sin,
            slots,
            planes[0],
            planes[1],
            q_heads,
            kv_heads,
            head_dim,
            rotary_dim,
            interleaved,
            q_norm,
            k_norm,
            1e-6,
            plus_one,
        )
        results.append((q_out, planes.float()))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    if not fp8:
        torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)
        return
    one_step = ((results[0][1] - results[1][1]).abs() <= 0.126 * results[1][1].abs() + 2**-9).float().mean()
    # the interpreter loses the carry when e4m3 rounds up to a power of two
    assert one_step >= (0.97 if device.type == "cpu" else 1.0)


def test_write_kv_equals_twin(device: torch.device) -> None:
    k, v = torch.randn(2, 4, 3, 24, device=device)
    slots = torch.tensor([72, -1, 0, 216], device=device)
    results = []
    for run in (gpu.write_kv, rope.write_kv_torch):
        planes = torch.zeros(2, 300, device=device)
        run(k[..., :16], v[..., :16], slots, planes[0], planes[1])
        results.append(planes)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert results[0].count_nonzero() == 2 * 3 * 3 * 16


def test_slots_past_two_to_the_31(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs 4 GiB of planes")
    planes = torch.zeros(2, 2**31 + 64, dtype=torch.float8_e4m3fn, device=device)
    k = torch.ones(1, 1, 16, device=device)
    gpu.write_kv(k, k, torch.tensor([2**31 + 16], device=device), planes[0], planes[1])
    assert planes[0, 2**31 + 16 : 2**31 + 32].float().sum() == 16
    assert planes[0, : 2**31 + 16].view(torch.uint8).max() == 0


def _rotated(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int, dim: int, **options: Any
) -> tuple[torch.Tensor, ...]:
    num_tokens = qkv.shape[0]
    q_out = qkv.new_empty(num_tokens, heads, dim)
    planes = torch.zeros(2, num_tokens * kv_heads * dim)
    slots = torch.arange(num_tokens) * kv_heads * dim
    rope.rope_and_cache(
        q_out,
        qkv,
        cos,
        sin,
        slots,
        planes[0],
        planes[1],
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        rotary_dim=dim,
        **options,
    )
    return q_out, planes[0].view(num_tokens, kv_heads, dim), planes[1].view(num_tokens, kv_heads, dim)


def test_twin_is_llama() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(6)[None])
    qkv = torch.randn(6, 8 * 16)
    q, k, v = qkv.view(6, 8, 16).split((4, 2, 2), dim=1)
    q_expected, k_expected = modeling_llama.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin
    )
    q_out, k_out, v_out = _rotated(qkv, cos[0], sin[0], 4, 2, 16)
    torch.testing.assert_close(q_out, q_expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_out, k_expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    assert torch.equal(v_out, v)


def test_twin_is_qwen3_with_head_norms() -> None:
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    cos, sin = modeling_qwen3.Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.arange(6)[None])
    q_norm, k_norm = (modeling_qwen3.Qwen3RMSNorm(16, eps=1e-5) for _ in range(2))
    q_norm.weight.data.uniform_(0.5, 1.5)
    k_norm.weight.data.uniform_(0.5, 1.5)
    qkv = torch.randn(6, 8 * 16)
    q, k, _ = qkv.view(6, 8, 16).split((4, 2, 2), dim=1)
    with torch.no_grad():
        q_expected, k_expected = modeling_qwen3.apply_rotary_pos_emb(
            q_norm(q).transpose(0, 1)[None], k_norm(k).transpose(0, 1)[None], cos, sin
        )
    q_out, k_out, _ = _rotated(
        qkv, cos[0], sin[0], 4, 2, 16, q_norm=q_norm.weight.data, k_norm=k_norm.weight.data, norm_eps=1e-5
    )
    torch.testing.assert_close(q_out, q_expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k_out, k_expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_twin_is_cohere_interleaved() -> None:
    config = Cohere2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    cos, sin = modeling_cohere2.Cohere2RotaryEmbedding(config)(torch.zeros(1), torch.arange(6)[None])
    qkv = torch.randn(6, 8 * 16)
    q, k, _ = qkv.view(6, 8, 16).split((4, 2, 2), dim=1)
    q_expected, k_expected = modeling_cohere2.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin
    )
    q_out, k_out, _ = _rotated(qkv, cos[0, :, ::2], sin[0, :, ::2], 4, 2, 16, interleaved=True)
    torch.testing.assert_close(q_out, q_expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_out, k_expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
