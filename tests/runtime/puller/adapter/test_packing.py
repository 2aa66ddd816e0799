"""Adapters made by PEFT are packed to PEFT's own deltas, or refused by the name of what is not supported."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runtime.errors import Cancelled, LoadFailed
from runtime.puller.adapter.files import inspect_adapter
from runtime.puller.adapter.packing import narrowed, pack_adapter, size_of
from tests.support.adapters import TARGETS, peft_model, save_adapter
from tests.support.families import family
from tests.support.sources import job
from tests.support.tiny_models import tiny

MAX_RANK = 64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 32},
    "rank pattern": {"r": 8, "rank_pattern": {"q_proj": 4, r"layers.1.mlp.down_proj": 20}},
    "alpha pattern": {"r": 8, "alpha_pattern": {"v_proj": 64, "layers.0.self_attn.k_proj": 2}},
    "both patterns": {"r": 4, "rank_pattern": {"o_proj": 12}, "alpha_pattern": {"o_proj": 5}},
    "rslora": {"r": 16, "use_rslora": True, "rank_pattern": {"up_proj": 3}},
    "all linear": {"r": 8, "target_modules": "all-linear"},
    "regex": {"r": 8, "target_modules": r".*layers\.[02]\.(self_attn|mlp)\.(q|up)_proj"},
    "missing layers": {"r": 8, "layers_to_transform": [1]},
    "attention only": {"r": 33, "target_modules": ["q_proj", "v_proj"]},
    "gaussian": {"r": 8, "init_lora_weights": "gaussian"},
}


def packed(folder: Path, out: Path, dtype: str = "float32") -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    files = inspect_adapter(folder, MAX_RANK)
    pack_adapter(files, dtype, out, job())
    tensors = {
        name: tensor for name, tensor in load_file(out / "packed.safetensors").items() if not name.startswith("_")
    }
    with safe_open(out / "packed.safetensors", "pt") as file:
        assert file.metadata()["format"] == "repertory-adapter-1"
        assert file.metadata()["dtype"] == dtype
    assert sum(-(-t.numel() * t.element_size() // 256) * 256 for t in tensors.values()) == size_of(files, dtype)
    return tensors


def deltas(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    """PEFT's own scaled product of every adapted module."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in wrapped.named_modules()
        if isinstance(module, Linear)
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_pack_adapter_gives_pefts_deltas(options: dict[str, Any], tmp_path: Path) -> None:
    wrapped = peft_model(family("llama"), **options)
    tensors = packed(save_adapter(wrapped, tmp_path / "peft"), tmp_path / "packed")
    expected = deltas(wrapped)
    assert {name.rpartition(".")[0] for name in tensors} == expected.keys()
    for module, delta in expected.items():
        a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        assert a.shape[0] == b.shape[1] >= 16
        assert a.shape[0].bit_count() == 1
        torch.testing.assert_close(b @ a, delta, rtol=1e-5, atol=1e-5)


def test_pack_adapter_of_a_fused_base_keeps_one_a(tmp_path: Path) -> None:
    wrapped = peft_model(tiny("phi3"), r=8, target_modules=["qkv_proj", "gate_up_proj"])
    tensors = packed(save_adapter(wrapped, tmp_path / "peft"), tmp_path / "packed")
    for module, delta in deltas(wrapped).items():
        torch.testing.assert_close(
            tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"], delta, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pack_adapter_rounds_once_to_the_bases_type(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8, lora_alpha=24), tmp_path / "peft")
    weights = {name: tensor.to(stored) for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")
    for name, tensor in packed(folder, tmp_path / "packed", dtype).items():
        module, _, side = name.rpartition(".lora_")
        exact = weights[f"base_model.model.{module}.lora_{side}.weight"].float() * (3.0 if side == "B" else 1.0)
        exact = exact.to(getattr(torch, dtype))
        assert torch.equal(tensor[:8] if side == "A" else tensor[:, :8], exact)


def test_narrowed_rounds_to_bfloat16_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F000000, 4096, dtype=np.uint32)
    values = np.concatenate([bits, bits | 0x8000, bits | 0x80000000, (bits & 0xFFFF0000) | 0x8000]).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(narrowed(values, "bfloat16", "x"), expected)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens\.base_layer\.weight is a copy"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"r": 65}, "has rank 65, the limit is 64"),
    ],
)
def test_inspect_adapter_refuses_pefts_other_options(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), **{"target_modules": TARGETS, "r": 8, **options}), tmp_path)
    with pytest.raises(LoadFailed, match=named):
        inspect_adapter(folder, MAX_RANK)


def test_inspect_adapter_refuses_a_grown_vocabulary(tmp_path: Path) -> None:
    model = family("llama")
    model.resize_token_embeddings(200)
    folder = save_adapter(peft_model(model, r=8, target_modules=["q_proj", "embed_tokens"]), tmp_path)
    with pytest.raises(LoadFailed, match=r"embed_tokens"):
        inspect_adapter(folder, MAX_RANK)


Tensors = dict[str, torch.Tensor]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def _with(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: {}, "has no tensors"),
        (lambda t: {k: v for k, v in t.items() if k != f"{FIRST}.lora_B.weight"}, r"q_proj has no lora_B"),
        (_with(f"{FIRST}.lora_A.weight", torch.zeros(9, 48)), "lora_A of rank 9 and a lora_B of rank 8"),
        (_with(f"{FIRST}.lora_A.weight", torch.zeros(8)), r"has shape \[8\]"),
        (_with(f"{FIRST}.lora_A.weight", torch.zeros(0, 48)), r"has shape \[0, 48\]"),
        (_with(f"{FIRST}.lora_A.weight", torch.zeros(8, 48, dtype=torch.int32)), "is of type I32"),
        (_with(f"{FIRST}.lora_C.weight", torch.zeros(8, 48)), "must be used"),
        (_with(f"{FIRST}.lora_magnitude_vector", torch.zeros(8)), "belongs to DoRA"),
        (_with("base_model.model.lm_head.weight", torch.zeros(4, 4)), "modules_to_save"),
        (_with(FIRST.removeprefix("base_model.model.") + ".lora_A.weight", torch.zeros(8, 48)), "a second lora_A"),
        (_with("x" * 300, torch.zeros(1)), "a name of 300 characters"),
    ],
)
def test_inspect_adapter_names_the_tensor_that_does_not_fit(
    change: Callable[[Tensors], Tensors], named: str, tmp_path: Path
) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(LoadFailed, match=named):
        inspect_adapter(folder, MAX_RANK)


def test_inspect_adapter_refuses_a_rank_that_the_configuration_does_not_say(tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(LoadFailed, match=r"has rank 8 in the file and 4 by adapter_config\.json"):
        inspect_adapter(folder, MAX_RANK)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pack_adapter_refuses_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path / "peft")
    weights = load_file(folder / "adapter_model.safetensors")
    weights[f"{FIRST}.lora_B.weight"][3, 5] = value
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(LoadFailed, match=r"q_proj\.lora_B\.weight has values that are infinite or not a number"):
        packed(folder, tmp_path / "packed")


def test_pack_adapter_refuses_what_the_bases_type_cannot_hold(tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8, lora_alpha=8 * 10**6), tmp_path / "peft")
    with pytest.raises(LoadFailed, match="lora_B has values that are infinite"):
        packed(folder, tmp_path / "packed", "float16")


def test_inspect_adapter_refuses_truncated_and_pickled_files(tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(LoadFailed, match=r"adapter_model\.safetensors is truncated"):
        inspect_adapter(folder, MAX_RANK)
    file.unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(LoadFailed, match="only pickled weights"):
        inspect_adapter(folder, MAX_RANK)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LoadFailed, match=r"has no adapter_config\.json: it is not a PEFT adapter"):
        inspect_adapter(folder, MAX_RANK)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b'{"a": [' * 40_000, r"its header cannot be read \((RecursionError|JSONDecodeError)\)"),
        (b"[]", "its header cannot be read"),
        (b'{"a": {"dtype": "F32", "shape": [8, 48], "data_offsets": [0, 99]}}', "has 99 bytes, its shape needs 1536"),
        (b'{"a": {"dtype": "F32", "shape": [-8, -48], "data_offsets": [0, 1536]}}', "not whole numbers from 0 on"),
        (b'{"a": {"dtype": "F32", "shape": [1e9, 1e9], "data_offsets": [0, 8]}}', "not whole numbers from 0 on"),
        (b'{"a": {"dtype": "F1", "shape": [8], "data_offsets": [0, 8]}}', r"its header cannot be read \(KeyError\)"),
    ],
)
def test_inspect_adapter_refuses_damaged_headers(header: bytes, named: str, tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(LoadFailed, match=named):
        inspect_adapter(folder, MAX_RANK)


@pytest.mark.parametrize("length", [0, (16 << 20) + 1, 2**63])
def test_inspect_adapter_reads_no_header_of_an_absurd_length(length: int, tmp_path: Path) -> None:
    """A sparse file takes no disk, and would take gigabytes of memory once its header is parsed."""
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(64 << 20)
    with pytest.raises(LoadFailed, match="the length of its header is out of range, which is 1 to 16777216 bytes"):
        inspect_adapter(folder, MAX_RANK)


def test_inspect_adapter_refuses_matrices_that_no_base_has(tmp_path: Path) -> None:
    """The file is sparse: 256 GB that take no disk."""
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    wide = 1 << 32
    shapes = {"A": [8, wide], "B": [48, 8]}
    offset, entries = 0, {}
    for side, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        entries[f"{FIRST}.lora_{side}.weight"] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps(entries).encode()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    with pytest.raises(LoadFailed, match=r"q_proj has 4294967296 inputs and 48 outputs, the limit is 1048576"):
        inspect_adapter(folder, MAX_RANK)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (b"[1]", "is not a JSON object"),
        (b'{"peft_type": "LORA", "r": 8', r"is not valid JSON at line 1"),
        (b'{"r": ' * 100_000, "is not valid JSON"),
        (b'{"peft_type": "LORA", "r": 1000000000, "lora_alpha": 1}', r"has rank 8 in the file and 1000000000"),
        (b" " * (80 << 20), "is larger than"),
    ],
)
def test_inspect_adapter_refuses_damaged_configurations(config: bytes, named: str, tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    (folder / "adapter_config.json").write_bytes(config)
    with pytest.raises(LoadFailed, match=named):
        inspect_adapter(folder, MAX_RANK)


def test_pack_adapter_stops_when_it_is_cancelled(tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path / "peft")
    cancelled = job()
    cancelled.cancel()
    (tmp_path / "out").mkdir()
    with pytest.raises(Cancelled):
        pack_adapter(inspect_adapter(folder, MAX_RANK), "float32", tmp_path / "out", cancelled)


def test_inspect_adapter_identity_changes_with_the_files(tmp_path: Path) -> None:
    folder = save_adapter(peft_model(family("llama"), r=8), tmp_path)
    before = inspect_adapter(folder, MAX_RANK).identity
    assert inspect_adapter(folder, MAX_RANK).identity == before
    save_adapter(peft_model(family("llama"), r=8, seed=1), folder)
    assert inspect_adapter(folder, MAX_RANK).identity != before
