"""The fp8 linear: the Triton kernels against their twins, and the twin against float64."""

import pytest
import torch

from runtime.checkpoint.fp8 import quantize_rows
from runtime.engine.kernels import linear8
from runtime.engine.kernels.gpu import linear8 as gpu
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
    torch.testing.assert_close(linear8.linear_fp8(x, weight, scale, bias).double(), exact, rtol=1e-5, atol=1e-5)


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
    gpu.linear_fp8(x, weight, scale, bias, out, Scratch.allocate(device))
    twin = torch.empty_like(out)
    linear8.linear_fp8_torch(x, weight, scale, bias, twin)
    # The interpreter does not round x to the nearest code. The matrix unit sums e4m3 products with 14 bits.
    assert _relative_error(out, twin) < (0.08 if device.type == "cpu" else 6e-3)


def test_quantize_rows_kernel_equals_the_packer(device: torch.device) -> None:
    x = torch.randn(5, 320, device=device).to(torch.bfloat16)
    x[2] = 0
    codes, scale = gpu.quantize_rows(x, None, torch.float8_e4m3fn)
    twin, twin_scale = quantize_rows(x)
    torch.testing.assert_close(scale, twin_scale.view(-1))
    # The interpreter does not round to the nearest code, and a GPU's division is exact to two units in the last place.
    equal = float((codes.float() == twin.float()).float().mean())
    assert equal >= (0.9 if device.type == "cpu" else 0.99)
    assert not codes[2].float().any()
