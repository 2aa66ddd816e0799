"""RMSNorm: the Triton kernel against its twin, the twin against float64 and transformers."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from runtime.engine.kernels import norm
from runtime.engine.kernels.gpu import norm as gpu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(3, 100), (1, 64), (2, 2, 257)])
def test_kernel_equals_twin(device: torch.device, dtype: torch.dtype, plus_one: bool, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(2, *shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    ours, twin = torch.full_like(x, torch.nan), torch.empty_like(x)
    gpu.rms_norm(x, weight, 1e-5, plus_one, ours)
    norm.rms_norm_torch(x, weight, 1e-5, plus_one, twin)
    torch.testing.assert_close(ours, twin, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    ours_residual, twin_residual = residual.clone(), residual.clone()
    gpu.add_rms_norm(x, ours_residual, weight, 1e-5, plus_one, ours)
    norm.add_rms_norm_torch(x, twin_residual, weight, 1e-5, plus_one, twin)
    # the interpreter cuts bf16 off where hardware rounds it
    ulp = 8e-3 if device.type == "cpu" and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(ours_residual, twin_residual, rtol=ulp, atol=0)
    torch.testing.assert_close(ours, twin, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_twin_is_transformers_norm(dtype: torch.dtype) -> None:
    x = torch.randn(5, 96, dtype=dtype)
    weight = torch.randn(96, dtype=dtype)
    for kind, plus_one in ((LlamaRMSNorm, False), (GemmaRMSNorm, True)):
        module = kind(96, eps=1e-5).to(dtype)
        module.weight.data.copy_(weight)
        assert torch.equal(norm.rms_norm(x, weight, 1e-5, plus_one), module(x))


def test_twin_against_float64() -> None:
    x, residual = torch.randn(2, 4, 33)
    weight = torch.randn(33)
    summed = x.double() + residual.double()
    expected = summed / (summed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    normed, new_residual = norm.add_rms_norm(x, residual, weight, 1e-6)
    assert new_residual.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(new_residual.double(), summed, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-6)


def test_norm_of_no_rows(device: torch.device) -> None:
    x = torch.empty(0, 8, device=device)
    gpu.rms_norm(x, torch.ones(8, device=device), 1e-6, False, torch.empty_like(x))
