"""The 16-bit linear of few rows: the Triton kernel against its twin, the twin against float64."""

import pytest
import torch

from runtime.engine.kernels import linear16
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.gpu import linear16 as gpu
from runtime.engine.kernels.scratch import Scratch


def _case(
    device: torch.device, num_rows: int, num_outputs: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(num_rows, in_features).to(dtype)
    weight = (torch.randn(num_outputs, in_features) / in_features**0.5).to(dtype)
    bias = torch.randn(num_outputs).to(dtype)
    return x.to(device), weight.to(device), bias.to(device)


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh", "gelu"])
def test_twin_is_the_product(gate: Activation | None) -> None:
    x, weight, bias = _case(torch.device("cpu"), 3, 12, 64, torch.float32)
    exact = x.double() @ weight.double().T + bias.double()
    if gate is not None:
        g, u = exact.chunk(2, dim=-1)
        act = (
            torch.nn.functional.silu(g)
            if gate == "silu"
            else torch.nn.functional.gelu(g, approximate="tanh" if gate == "gelu_tanh" else "none")
        )
        exact = act * u
    torch.testing.assert_close(linear16.linear_16bit(x, weight, bias, gate).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features", "gate"),
    [
        (1, 40, 512, None),
        (5, 64, 1024, "silu"),
        (17, 80, 512, "gelu_tanh"),
        (33, 128, 1024, None),
        (64, 40, 512, "gelu"),
    ],
)
@pytest.mark.parametrize(("splits", "early"), [(1, False), (2, True), (3, False)])
def test_kernel_equals_twin(
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    num_outputs: int,
    in_features: int,
    gate: Activation | None,
    splits: int,
    early: bool,
) -> None:
    x, weight, bias = _case(device, num_rows, num_outputs, in_features, dtype)
    bias_or_none = bias if num_rows % 2 else None
    expected = torch.empty(num_rows, num_outputs // (1 if gate is None else 2), dtype=dtype, device=device)
    linear16.linear_16bit_torch(x, weight, bias_or_none, gate, expected)
    out = torch.full_like(expected, float("nan"))
    scratch = Scratch.allocate(device)
    block_m, block_n, block_k, _, _, num_warps, num_stages = gpu.tiling(
        num_rows, expected.shape[1], in_features, gate is not None
    )
    gpu.launch(
        x, weight, bias_or_none, gate, out, scratch, block_m, block_n, block_k, splits, early, num_warps, num_stages
    )
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    assert error < (2e-2 if dtype is torch.bfloat16 else 2e-3)
    assert not scratch.counters.any()


def test_serves_only_few_rows_on_a_gpu() -> None:
    x, weight, _ = _case(torch.device("cpu"), 1, 8, 512, torch.bfloat16)
    assert not linear16.serves(x, weight)
