"""The fp8 linear: the Triton kernels against their twins, and the twin against float64."""

import pytest
import torch

from runtime.checkpoint.fp8 import quantize_rows
from runtime.engine.kernels import linear8
from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.gpu import linear8 as gpu
from runtime.engine.kernels.quantized_rows import QuantizedRows
from runtime.engine.kernels.quantized_rows import quantize_rows as quantize_activations
from runtime.engine.kernels.scratch import Scratch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _weight(num_outputs: int, in_features: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize_rows(torch.randn(num_outputs, in_features) / in_features**0.5)
    return codes.to(device), scale.view(-1).to(device)


def _relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_twin_is_the_product_of_the_dequantised_operands() -> None:
    weight, scale = _weight(12, 64, torch.device("cpu"))
    x, bias = torch.randn(3, 64), torch.randn(12)
    codes, x_scale = quantize_rows(x)
    exact = (codes.double() * x_scale) @ (weight.double() * scale.double()[:, None]).T + bias.double()
    torch.testing.assert_close(linear8.linear_8bit(x, weight, scale, bias).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features"),
    [(1, 40, 512), (5, 64, 1024), (17, 70, 320), (64, 48, 512), (130, 96, 512), (300, 40, 256)],
)
def test_kernel_equals_twin(
    device: torch.device, dtype: torch.dtype, num_rows: int, num_outputs: int, in_features: int
) -> None:
    weight, scale = _weight(num_outputs, in_features, device)
    x = torch.randn(num_rows, in_features, device=device).to(dtype)
    bias = torch.randn(num_outputs, device=device).to(dtype) if num_rows % 2 else None
    out = torch.full((num_rows, num_outputs), torch.nan, dtype=dtype, device=device)
    rows = quantize_activations(x, torch.float8_e4m3fn)
    gpu.linear_8bit(rows, weight, scale, bias, None, out, Scratch.allocate(device))
    twin = torch.empty_like(out)
    linear8.linear_8bit_torch(rows, weight, scale, bias, None, twin)
    # The interpreter cuts bf16 off. The matrix unit sums e4m3 products with 14 bits.
    assert _relative_error(out, twin) < 6e-3


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("num_rows", "gate"), [(1, "silu"), (5, "gelu_tanh"), (32, "gelu"), (33, "silu")])
@pytest.mark.parametrize(("num_outputs", "in_features"), [(48, 512), (70, 320)])
def test_gate_is_the_activation_of_the_product(
    device: torch.device,
    codes: torch.dtype,
    num_rows: int,
    gate: Activation,
    num_outputs: int,
    in_features: int,
) -> None:
    weight = quantize_activations(torch.randn(2 * num_outputs, in_features, device=device) / in_features**0.5, codes)
    rows = quantize_activations(torch.randn(num_rows, in_features, device=device).to(torch.bfloat16), codes)
    bias = torch.randn(2 * num_outputs, device=device, dtype=torch.bfloat16) if num_rows % 2 else None
    gate_up, out, twin = (
        torch.full((num_rows, width), torch.nan, dtype=torch.bfloat16, device=device)
        for width in (2 * num_outputs, num_outputs, num_outputs)
    )
    linear8.linear_8bit_torch(rows, weight.codes, weight.scale, bias, gate, twin)
    linear8.linear_8bit_torch(rows, weight.codes, weight.scale, bias, None, gate_up)
    assert torch.equal(twin, act_mul(gate_up, gate))
    gpu.linear_8bit(rows, weight.codes, weight.scale, bias, gate, out, None)
    assert _relative_error(out, twin) < (2e-2 if device.type == "cpu" else 6e-3)  # The interpreter cuts bf16 off.


def test_linear_8bit_takes_quantised_rows_as_they_are() -> None:
    weight, scale = _weight(12, 64, torch.device("cpu"))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    once = linear8.linear_8bit(x, weight, scale)
    rows = quantize_activations(x, torch.float8_e4m3fn)
    assert torch.equal(linear8.linear_8bit(rows, weight, scale), once)
    assert once.dtype is torch.bfloat16
    doubled = QuantizedRows(rows.codes, rows.scale * 2, rows.dtype)
    assert torch.equal(linear8.linear_8bit(doubled, weight, scale), once * 2)
