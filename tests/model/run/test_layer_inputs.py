"""Inputs of 8-bit layers: quantised by the kernel before or by the layer itself, the product is the same."""

import pytest
import torch

from runtime.checkpoint import fp8
from runtime.engine.kernels.linear8 import GATED_ROWS
from runtime.engine.kernels.quantized_rows import QuantizedRows, quantize_rows
from runtime.engine.model.run.layer_inputs import gated, input_codes, normed, product
from runtime.engine.model.run.linear import Linear8, PlainLinear


def _layer(num_outputs: int, in_features: int, codes: torch.dtype) -> Linear8:
    weight = torch.randn(num_outputs, in_features)
    if codes is torch.int8:
        rows = quantize_rows(weight, codes)
        return Linear8(rows.codes, rows.scale)
    packed, scale = fp8.quantize_rows(weight)
    return Linear8(packed, scale.view(-1))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("first", [True, False])
def test_normed_quantises_what_the_layer_would(codes: torch.dtype, first: bool) -> None:
    layer = _layer(24, 64, codes)
    assert input_codes(layer) is codes
    branch = None if first else torch.randn(3, 64, dtype=torch.bfloat16)
    residual, weight = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    plain, plain_residual = normed(branch, residual.clone(), weight, 1e-5, False, None)
    rows, rows_residual = normed(branch, residual.clone(), weight, 1e-5, False, codes)
    assert isinstance(rows, QuantizedRows)
    assert torch.equal(plain_residual, rows_residual)
    assert torch.equal(product(layer, plain, None), product(layer, rows, None))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_rows", [1, GATED_ROWS, GATED_ROWS + 1])
def test_gated_gives_the_next_layer_the_same_codes(codes: torch.dtype, num_rows: int) -> None:
    gate_up, down = _layer(2 * 32, 64, codes), _layer(16, 32, codes)
    x = quantize_rows(torch.randn(num_rows, 64, dtype=torch.bfloat16), codes)
    plain = gated(gate_up, x, "silu", None, None)
    inner = gated(gate_up, x, "silu", codes, None)
    # At few rows the product applies the gate, and no program has a whole row.
    assert isinstance(inner, QuantizedRows) == (num_rows > GATED_ROWS)
    assert torch.equal(product(down, plain, None), product(down, inner, None))


def test_unquantised_layer_takes_no_codes() -> None:
    layer = PlainLinear(torch.randn(8, 16))
    assert input_codes(layer) is None
    with pytest.raises(TypeError, match="PlainLinear does not take quantised rows"):
        product(layer, quantize_rows(torch.randn(2, 16), torch.int8), None)
