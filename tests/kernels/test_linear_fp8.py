"""The fp8 linear: the Triton kernels against their twins, and the twin against float64."""

import pytest
import torch

from runtime.checkpoint.fp8 import quantize_rows
from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.gpu import linear_fp8 as gpu
from runtime.engine.kernels.linear_fp8 import linear_fp8, linear_fp8_torch
from runtime.engine.kernels.scratch import Scratch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _weight(num_outputs: int, in_features: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = quantize_rows(torch.randn(num_outputs, in_features) / in_features**0.5)
    return codes.to(device), scale.view(-1).to(device)


def _relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def _every_code() -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    return codes[(codes & 0x7F) != 0x7F]  # 0x7f and 0xff are NaN


def test_twin_is_the_product_with_the_dequantised_weight() -> None:
    weight, scale = _weight(12, 64, torch.device("cpu"))
    x, bias = torch.randn(3, 64), torch.randn(12)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()
    torch.testing.assert_close(linear_fp8(x, weight, scale, bias).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_widens_every_code_exactly(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cpu" and dtype is not torch.float32:
        pytest.skip("the interpreter runs the float32 path for all types")
    codes = _every_code()
    weight = torch.zeros(len(codes), 256, dtype=torch.uint8)
    weight[:, 0] = codes
    weight = weight.to(device).view(torch.float8_e4m3fn)
    x = torch.zeros(1, 256, dtype=dtype, device=device)
    x[0, 0] = 1
    out = torch.full((1, len(codes)), torch.nan, dtype=dtype, device=device)
    gpu.linear_fp8(x, weight, torch.ones(len(codes), device=device), None, None, out, None)
    assert torch.equal(out[0].float().cpu(), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features", "gate"),
    [
        (1, 40, 512, None),
        (5, 64, 1024, "silu"),
        (17, 80, 512, "gelu_tanh"),
        (33, 128, 1024, None),
        (64, 48, 512, "gelu"),
    ],
)
def test_kernel_of_few_rows_equals_twin(
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    num_outputs: int,
    in_features: int,
    gate: Activation | None,
) -> None:
    weight, scale = _weight(num_outputs, in_features, device)
    x = torch.randn(num_rows, in_features, device=device).to(dtype)
    bias = torch.randn(num_outputs, device=device).to(dtype) if num_rows % 2 else None
    twin = torch.empty(num_rows, num_outputs // (1 if gate is None else 2), dtype=dtype, device=device)
    linear_fp8_torch(x, weight, scale, bias, gate, twin)
    out = torch.full_like(twin, torch.nan)
    gpu.linear_fp8(x, weight, scale, bias, gate, out, Scratch.allocate(device))
    # The interpreter truncates bf16 where hardware rounds.
    assert _relative_error(out, twin) < (2e-5 if dtype is torch.float32 else 2e-2 if device.type == "cpu" else 4e-3)


@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_quantise_their_activations(
    device: torch.device, dtype: torch.dtype, gate: Activation | None
) -> None:
    weight, scale = _weight(96, 512, device)
    x = torch.randn(100, 512, device=device).to(dtype)
    bias = torch.randn(96, device=device).to(dtype)
    exact = (x.double() @ (weight.double() * scale.double()[:, None]).T + bias.double()).float()
    expected = exact if gate is None else act_mul(exact, gate)
    out = torch.full((100, expected.shape[1]), torch.nan, dtype=dtype, device=device)
    gpu.linear_fp8(x, weight, scale, bias, gate, out, None)
    # e4m3 has 3 bits of mantissa: a relative error of 2^-4 at most, 2.6 % in the mean of squares. The interpreter
    # truncates where hardware rounds.
    allowed = 0.08 if device.type == "cpu" else 0.05
    assert _relative_error(out, expected) < (allowed if dtype is torch.bfloat16 else 1e-5)


def test_quantize_rows_kernel_equals_the_packer(device: torch.device) -> None:
    x = torch.randn(5, 320, device=device).to(torch.bfloat16)
    x[2] = 0
    codes, scale = gpu.quantize_rows(x)
    twin, twin_scale = quantize_rows(x)
    torch.testing.assert_close(scale, twin_scale)
    # The interpreter does not round to the nearest code, and a GPU's division is exact to two units in the last place.
    equal = float((codes.float() == twin.float()).float().mean())
    assert equal >= (0.9 if device.type == "cpu" else 0.99)
    assert not codes[2].float().any()
