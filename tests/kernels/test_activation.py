"""act(gate) × up: the Triton kernel against its twin, the twin against float64."""

import pytest
import torch

from runtime.engine.kernels import activation
from runtime.engine.kernels.gpu import activation as gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_kernel_equals_twin(device: torch.device, dtype: torch.dtype, kind: activation.Activation) -> None:
    gate_up = torch.randn(3, 2 * 530, dtype=dtype, device=device) * 3
    ours, twin = gate_up.new_full((3, 530), torch.nan), gate_up.new_empty(3, 530)
    gpu.act_mul(gate_up, kind, ours)
    activation.act_mul_torch(gate_up, kind, twin)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(ours, twin, rtol=tolerance, atol=tolerance)


def test_twin_against_float64() -> None:
    gate_up = torch.randn(2, 3, 20)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = {
        "silu": gate / (1 + torch.exp(-gate)),
        "gelu": gate * 0.5 * (1 + torch.erf(gate / 2**0.5)),
        "gelu_tanh": gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
    }
    for kind, act in exact.items():
        torch.testing.assert_close(activation.act_mul(gate_up, kind).double(), act * up, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
