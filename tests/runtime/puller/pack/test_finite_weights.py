"""Weights that are infinite or not a number are refused by the tensor's name while they are packed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.model_key import Quantization
from runtime.errors import LoadFailed
from runtime.puller.pack.finite_weights import check_stored
from runtime.puller.pack.packing import pack
from runtime.puller.pack.quantize import quantize
from runtime.puller.pack.request import PackRequest
from tests.support.llama_checkpoints import tiny_llama

MATRIX, NORM = "model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"


def pack_with(folder: Path, name: str, value: float, quantization: Quantization, dtype: str = "float32") -> None:
    """Pack a checkpoint in which one number of the tensor `name` is `value`."""
    tiny_llama(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[5] = value
    save_file(weights, file, {"format": "pt"})
    (folder / "out").mkdir()
    pack(
        PackRequest("safetensors", str(folder), (str(file),), str(folder / "out"), "", quantization, dtype=dtype),
        lambda event: None,
    )


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4, Quantization.FP8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [MATRIX, NORM])
def test_pack_refuses_weights_that_are_not_finite(
    tmp_path: Path, name: str, value: float, quantization: Quantization
) -> None:
    with pytest.raises(LoadFailed, match=f"tensor {name} has values that are infinite or not a number"):
        pack_with(tmp_path, name, value, quantization)


@pytest.mark.parametrize(
    ("quantization", "dtype", "holder"),
    [(Quantization.NF4, "float16", "float16"), (Quantization.INT8, "bfloat16", "int8")],
)
def test_pack_names_the_type_that_cannot_hold_a_weight(
    tmp_path: Path, quantization: Quantization, dtype: str, holder: str
) -> None:
    with pytest.raises(LoadFailed, match=f"tensor {MATRIX} has values that {holder} cannot hold"):
        pack_with(tmp_path, MATRIX, 1e5, quantization, dtype)


def test_pack_keeps_the_largest_finite_weights(tmp_path: Path) -> None:
    pack_with(tmp_path, MATRIX, 65504.0, Quantization.NF4, "float16")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_stored_fp8_codes_that_are_no_numbers_are_refused(code: int) -> None:
    matrix = quantize(torch.randn(4, 64), Quantization.FP8, double_quant=False)
    check_stored(matrix, MATRIX)
    matrix.weight.view(torch.uint8)[3, 60] = code
    with pytest.raises(LoadFailed, match=f"tensor {MATRIX}"):
        check_stored(matrix, MATRIX)


@pytest.mark.parametrize("quantization", [Quantization.FP8, Quantization.INT8, Quantization.NF4])
def test_stored_scales_that_are_no_numbers_are_refused(quantization: Quantization) -> None:
    matrix = quantize(torch.randn(64, 64), quantization, double_quant=False)
    check_stored(matrix, MATRIX)
    matrix.scale.view(-1)[2] = float("nan")
    with pytest.raises(LoadFailed, match=f"tensor {MATRIX}"):
        check_stored(matrix, MATRIX)
