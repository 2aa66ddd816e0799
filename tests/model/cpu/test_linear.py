"""A CPU's linears over quantised weights: the product with the numbers that bitsandbytes unpacks, whatever is unpacked at a time."""

import gguf
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from runtime.checkpoint.fp8 import quantize_rows
from runtime.engine.kernels.codebooks import Codebook
from runtime.engine.model.cpu.linear import CpuLinear4, CpuLinear8, CpuLinearFp8, CpuLinearGguf

# of float64's result; bf16's own rounding is 2^-9 of each number
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=[1 << 21, 1000], ids=["whole", "in parts"])
def part_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("runtime.engine.model.cpu.linear._PART_ELEMENTS", request.param)
    return int(request.param)


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> float:
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.shape == wanted.shape
    assert found.dtype is x.dtype
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.usefixtures("part_elements")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("biased", [False, True])
def test_4bit(codebook: str, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(37, 128), torch.randn(37).to(dtype) if biased else None
    codes, state = quantize_4bit(weight, blocksize=64, quant_type=codebook)
    linear = CpuLinear4(codes.view(37, 64), state.absmax.view(37, 2), codebook, bias)
    state.dtype = dtype
    for shape in [(1, 128), (50, 128), (2, 3, 128)]:
        x = torch.randn(shape).to(dtype)
        assert error(linear(x), x, dequantize_4bit(codes, state), bias) < TOLERANCE[dtype]


@pytest.mark.usefixtures("part_elements")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("codebook", ["q4_0", "iq4_nl"])
@pytest.mark.parametrize("biased", [False, True])
def test_gguf(codebook: Codebook, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    scales, codes = torch.randn(37, 3, 1).half(), torch.randint(0, 256, (37, 3, 16), dtype=torch.uint8)
    bias = torch.randn(37).to(dtype) if biased else None
    stored = torch.cat((scales.view(torch.uint8), codes), -1).flatten(1).numpy()
    wide = torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[codebook.upper()]))
    linear = CpuLinearGguf(codes.flatten(1), scales.flatten(1), codebook, bias)
    for shape in [(1, 96), (50, 96), (2, 3, 96)]:
        x = torch.randn(shape).to(dtype)
        assert error(linear(x), x, wide, bias) < TOLERANCE[dtype]


@pytest.mark.usefixtures("part_elements")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("columns", [96, 24, 17])
def test_int8(columns: int, dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    weight, scale = torch.randint(-127, 128, (37, columns), dtype=torch.int8), torch.rand(37) / 127
    bias = torch.randn(37).to(dtype) if biased else None
    linear = CpuLinear8(weight, scale, bias)
    for shape in [(1, columns), (8, columns), (9, columns), (2, 3, columns), (0, columns)]:
        x = torch.randn(shape).to(dtype)
        if shape[0] == 0:
            assert linear(x).shape == (0, 37)
        else:
            assert error(linear(x), x, weight.double() * scale.to(dtype).double()[:, None], bias) < TOLERANCE[dtype]


@pytest.mark.usefixtures("part_elements")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
def test_fp8(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    codes, scale = quantize_rows(torch.randn(37, 96))
    bias = torch.randn(37).to(dtype) if biased else None
    linear = CpuLinearFp8(codes, scale.view(-1), bias)
    for shape in [(1, 96), (50, 96), (2, 3, 96)]:
        x = torch.randn(shape).to(dtype)
        assert error(linear(x), x, codes.double() * scale.to(dtype).double(), bias) < TOLERANCE[dtype]
