"""Which weights are quantised, and that their predicted bytes are those of the packed file."""

from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import OPTConfig, OPTForCausalLM

from common.model_key import Quantization
from runtime.checkpoint.meta_model import build_skeleton
from runtime.checkpoint.quantized_shapes import is_layer_matrix, packed_bytes, packed_shapes
from runtime.puller.pack.packing import pack
from runtime.puller.pack.request import PACKED_NAME, PackRequest
from runtime.puller.pack.tensors import quantizable
from runtime.puller.pack.writer import PADDING
from runtime.puller.safetensors_header import read_header
from runtime.puller.sizing import tensor_bytes
from tests.support.llama_checkpoints import tiny_llama


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), True),
        ("transformer.h.11.mlp.c_fc.weight", (64, 64), True),
        ("model.layers.0.input_layernorm.weight", (64,), False),
        ("model.layers.0.q_norm.weight", (4, 16), False),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 64, 64), False),
        ("model.layers.0.self_attn.q_proj.bias", (64, 1), False),
        ("lm_head.weight", (100, 64), False),
    ],
)
def test_is_layer_matrix_by_name_and_shape(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_layer_matrix(name, shape) is expected


def test_quantizable_modules_are_the_linear_layers_of_decoder_layers() -> None:
    config = OPTConfig(
        vocab_size=100, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    found = quantizable(build_skeleton(OPTForCausalLM, config, "eager"))
    assert {name.split(".layers.")[0] for name in found} == {"model.decoder"}
    assert len(found) == 2 * 6  # four projections and two layers of the MLP; project_in and project_out are outside


def test_packed_bytes_counts_codes_and_scales() -> None:
    assert packed_bytes((10, 192), Quantization.NF4) == 10 * 128 + 4 * 10 * 4  # padded to 256 columns
    assert packed_bytes((10, 192), Quantization.INT8) == 10 * 192 + 4 * 10
    assert packed_bytes((10, 100), Quantization.NF4) is None
    assert packed_shapes((10, 100), Quantization.FP8) == ((10, 100), "scale", (10,))


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.NF4, Quantization.FP8])
def test_predicted_bytes_are_those_of_the_packed_file(quantization: Quantization, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    stored = tmp_path / "m" / "model.safetensors"
    (tmp_path / "out").mkdir()
    request = PackRequest("safetensors", str(tmp_path / "m"), (str(stored),), str(tmp_path / "out"), "", quantization)
    pack(request, lambda event: None)
    with safe_open(tmp_path / "out" / PACKED_NAME, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys() if not name.startswith(PADDING)]  # noqa: SIM118
    predicted = sum(tensor_bytes(tensor, quantization, 4) for tensor in read_header(stored).tensors)
    assert predicted == sum(tensor.numel() * tensor.itemsize for tensor in tensors)
