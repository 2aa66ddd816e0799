"""Quantised linears: the Triton kernels against their twins, the twins against bitsandbytes' own functions and float64."""

from typing import get_args

import bitsandbytes
import gguf
import pytest
import torch
from torch.nn import functional

from runtime.checkpoint import layout_4bit
from runtime.checkpoint.quantized_shapes import padded_width
from runtime.engine.kernels import linear4, linear8
from runtime.engine.kernels.codebooks import Codebook, codebook_values
from runtime.engine.kernels.gpu import linear4 as gpu4
from runtime.engine.kernels.gpu import linear8 as gpu8
from runtime.engine.kernels.gpu.linear4_triton import lookup_tables
from runtime.engine.kernels.quantized_rows import quantize_rows
from runtime.engine.kernels.scratch import Scratch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def _quantized(
    num_outputs: int, in_features: int, kind: str, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random weight in the kernels' layout, and what bitsandbytes or gguf makes of it again, float32 [N, K]."""
    if kind in ("q4_0", "iq4_nl"):
        return _blocks(num_outputs, in_features, kind, device)
    weight = torch.randn(num_outputs, in_features) * 0.1
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    state.shape = torch.Size(
        [num_outputs * in_features]
    )  # its CPU code takes blocks of a row that is no multiple of 64 for whole
    wide = bitsandbytes.functional.dequantize_4bit(packed, state).float().view(num_outputs, in_features)
    ours, absmax = layout_4bit.kernel_layout_4bit(packed, state.absmax, num_outputs, in_features)
    return ours.to(device), absmax.to(device), wide.to(device)


def _blocks(
    num_outputs: int, in_features: int, kind: str, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random GGUF blocks in the kernels' layout, and what gguf makes of them."""
    scales = (torch.randn(num_outputs, in_features // 32, 1) * 0.01).half()
    codes = torch.randint(0, 256, (num_outputs, in_features // 32, 16), dtype=torch.uint8)
    stored = torch.cat((scales.view(torch.uint8), codes), -1).flatten(1)
    wide = gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    weight, kept = layout_4bit.kernel_layout_gguf(stored)
    return weight.to(device), kept.to(device), torch.from_numpy(wide).to(device)


@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl"])
@pytest.mark.parametrize("in_features", [32, 64, 128, 352])
def test_twin_dequantises_blocks_as_gguf(kind: Codebook, in_features: int) -> None:
    weight, scales, wide = _quantized(6, in_features, kind)
    assert weight.shape == (6, padded_width(in_features) // 2)
    assert torch.equal(linear4.dequantize_4bit_torch(weight, scales, kind, in_features, torch.float32), wide)
    codes, scales_again = layout_4bit.gguf_layout(weight, scales, in_features)
    halves = torch.stack((codes & 15, codes >> 4)).view(2, 6, -1, 16).permute(1, 2, 0, 3).flatten(1)
    assert torch.equal(halves, layout_4bit.codes_4bit(weight, in_features))
    assert torch.equal(scales_again, scales[:, : in_features // 32])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("in_features", [64, 128, 320, 96])
def test_twin_dequantises_as_bitsandbytes(kind: Codebook, in_features: int) -> None:
    weight, absmax, wide = _quantized(6, in_features, kind)
    ours = linear4.dequantize_4bit_torch(weight, absmax, kind, in_features, torch.float32)
    torch.testing.assert_close(ours, wide, rtol=1e-6, atol=0)
    x = torch.randn(2, 3, in_features)
    bias = torch.randn(6)
    torch.testing.assert_close(
        linear4.linear_4bit(x, weight, absmax, kind, bias), functional.linear(x, wide, bias), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("in_features", [64, 128, 192, 640])
def test_layout_goes_there_and_back(in_features: int) -> None:
    packed, absmax = (
        torch.randint(0, 256, (5 * in_features // 2, 1), dtype=torch.uint8),
        torch.rand(5 * in_features // 64),
    )
    weight, scales = layout_4bit.kernel_layout_4bit(packed, absmax, 5, in_features)
    assert weight.shape == (5, padded_width(in_features) // 2)
    assert scales.shape == (5, padded_width(in_features) // 64)
    again, absmax_again = layout_4bit.bitsandbytes_layout_4bit(weight, scales, in_features)
    assert torch.equal(again, packed)
    assert torch.equal(absmax_again, absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features"),
    [(1, 70, 128), (3, 64, 320), (33, 20, 192), (130, 40, 64), (300, 130, 192)],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "q4_0", "iq4_nl"])
def test_4bit_kernel_equals_twin(
    device: torch.device, dtype: torch.dtype, kind: Codebook, num_rows: int, num_outputs: int, in_features: int
) -> None:
    weight, absmax, wide = _quantized(num_outputs, in_features, kind, device)
    x = torch.randn(num_rows, in_features, device=device).to(dtype)
    bias = torch.randn(num_outputs, device=device).to(dtype) if num_rows % 2 else None
    ours = x.new_full((num_rows, num_outputs), torch.nan)
    gpu4.linear_4bit(x, weight, absmax, kind, bias, None, ours, None)
    exact = functional.linear(x.double(), wide.double(), None if bias is None else bias.double())
    twin = linear4.linear_4bit_torch
    rounded = torch.empty_like(ours)
    twin(x, weight, absmax, kind, bias, None, rounded)
    # the interpreter cuts bf16 off where hardware rounds it
    allowed, least = 1.5, {torch.float32: 2e-6}.get(dtype, 5e-4)
    if device.type == "cpu":
        allowed, least = 2.5, 5e-3 if dtype is torch.bfloat16 else least
    assert _relative_error(ours, exact) <= max(allowed * _relative_error(rounded, exact), least)


@pytest.mark.parametrize(
    ("block_m", "block_n", "splits", "scale_sums"), [(16, 16, 3, True), (16, 32, 2, False), (32, 16, 1, False)]
)
@pytest.mark.parametrize("kind", ["nf4", "q4_0"])
def test_4bit_tilings(
    device: torch.device, kind: Codebook, block_m: int, block_n: int, splits: int, scale_sums: bool
) -> None:
    weight, absmax, wide = _quantized(40, 640, kind, device)
    x = torch.randn(20, 640, device=device).to(torch.bfloat16)
    ours = x.new_full((20, 40), torch.nan)
    scratch = Scratch.allocate(device, partial_elements=1 << 16, num_counters=64)
    gpu4.launch_fused(x, weight, absmax, kind, None, ours, scratch, block_m, block_n, splits, 4, 2, scale_sums)
    assert _relative_error(ours, x.double() @ wide.double().t()) < (8e-3 if device.type == "cpu" else 4e-3)
    assert scratch.counters.count_nonzero() == 0


@pytest.mark.parametrize("kind", ["nf4", "q4_0"])
def test_4bit_unpacks_in_pieces(device: torch.device, kind: Codebook) -> None:
    """Scratch memory for seven of the twenty output rows at a time."""
    weight, absmax, wide = _quantized(20, 128, kind, device)
    x, bias = torch.randn(257, 128, device=device), torch.randn(20, device=device)
    ours = x.new_full((257, 20), torch.nan)
    gpu4.linear_4bit(
        x,
        weight,
        absmax,
        kind,
        bias,
        None,
        ours,
        Scratch.allocate(device, partial_elements=1, staging_bytes=7 * 128 * 4),
    )
    assert _relative_error(ours, functional.linear(x.double(), wide.double(), bias.double())) < 2e-6


def test_lookup_tables_hold_every_code() -> None:
    """Low and high bytes, put together again, are the 16 values in the kernel's type."""
    for kind in get_args(Codebook):
        for dtype in (torch.bfloat16, torch.float16):
            tables = b"".join(word.to_bytes(4, "little") for word in lookup_tables(kind, dtype))
            halves = torch.tensor(
                [low | high << 8 for low, high in zip(tables[:16], tables[16:], strict=True)], dtype=torch.int32
            )
            assert torch.equal(
                halves.to(torch.int16).view(dtype).float(),
                torch.tensor(codebook_values(kind)).to(dtype).float(),
            )


def _int8(num_outputs: int, in_features: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(num_outputs, in_features, device=device)
    absmax = weight.abs().amax(1)
    return torch.round(weight * (127 / absmax)[:, None]).to(torch.int8), absmax / 127


def test_int8_twin_is_bitsandbytes() -> None:
    x, weight = torch.randn(4, 96, dtype=torch.float16), torch.randn(10, 96, dtype=torch.float16)
    x_int, x_absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(x)
    w_int, w_absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    expected = (x_int.double() @ w_int.double().t()) * x_absmax.double()[:, None] * w_absmax.double() / 127**2
    quantized = quantize_rows(x, torch.int8)
    assert (quantized.codes.int() - x_int.int()).abs().max() <= 1
    ours = linear8.linear_8bit(x, w_int, w_absmax.float() / 127)
    assert _relative_error(ours, expected) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "in_features"), [(1, 70, 200), (16, 64, 1024), (17, 30, 2048), (130, 140, 100)]
)
def test_int8_kernel_equals_twin(
    device: torch.device, dtype: torch.dtype, num_rows: int, num_outputs: int, in_features: int
) -> None:
    weight, scale = _int8(num_outputs, in_features, device)
    x = torch.randn(num_rows, in_features, device=device).to(dtype)
    bias = torch.randn(num_outputs, device=device).to(dtype) if num_rows % 2 else None
    ours, twin = x.new_full((2, num_rows, num_outputs), torch.nan)
    scratch = Scratch.allocate(device, partial_elements=1 << 18, num_counters=64)
    rows = quantize_rows(x, torch.int8)
    gpu8.linear_8bit(rows, weight, scale, bias, None, ours, scratch)
    linear8.linear_8bit_torch(rows, weight, scale, bias, None, twin)
    assert _relative_error(ours, twin) < {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert scratch.counters.count_nonzero() == 0


def test_int8_rows_of_zeros(device: torch.device) -> None:
    x = torch.zeros(17, 64, device=device)
    weight, scale = _int8(8, 64, device)
    ours = x.new_full((17, 8), torch.nan)
    gpu8.linear_8bit(quantize_rows(x, torch.int8), weight, scale, None, None, ours, None)
    assert torch.equal(ours, torch.zeros_like(ours))
