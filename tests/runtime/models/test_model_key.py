"""The model key's JSON: what is taken, what is refused, and by which name; the configuration's sources; a checkpoint's first look."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.model_key import DefaultSampling, ModelSettings, Quantization
from runtime.config.loader import configure
from runtime.errors import InvalidRequest, LoadFailed
from runtime.models.model_key import fingerprint, parse_model
from runtime.puller.checkpoint_check import CheckpointKind, Policy, inspect
from runtime.puller.gguf_metadata import read_gguf
from runtime.puller.sizing import checkpoint_dtype, compute_dtype, geometry_of, needs_of
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.smollm2 import gguf_path


def test_parse_model_accepts_modelmesh_fields() -> None:
    key = {
        "storage_key": "mine",
        "storage_params": {"bucket": "b"},
        "model_type": {"name": "llm", "version": "1"},
        "schema_path": "s",
        "bucket": "old",
        "disk_size_bytes": 5,
        "quantize": "nf4",
        "double_quant": True,
        "max_model_len": 100,
        "sampling": {"temperature": 0.5},
    }
    source, settings = parse_model("m", json.dumps(key))
    assert source == ModelSource("m", "mine", {"bucket": "b"})
    assert settings == ModelSettings(
        quantize=Quantization.NF4, double_quant=True, max_model_len=100, sampling=DefaultSampling(temperature=0.5)
    )
    assert parse_model("hf://a/b", "") == (ModelSource("hf://a/b"), ModelSettings())
    assert fingerprint(*parse_model("m", json.dumps(key))) == fingerprint(source, settings)
    assert fingerprint(source, ModelSettings()) != fingerprint(source, settings)


def test_parse_model_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match=r"model key: sampling\.top_p is 0") as caught:
        parse_model("/m", '{"sampling": {"top_p": 0}}')
    assert caught.value.param == "sampling.top_p"


def test_parse_model_refuses_to_keep_blocks_that_are_to_be_quantised() -> None:
    with pytest.raises(InvalidRequest, match="gguf_blocks keep excludes quantize nf4"):
        parse_model("/m", '{"gguf_blocks": "keep", "quantize": "nf4"}')


def test_parse_model_reads_an_empty_storage_key_as_none() -> None:
    assert parse_model("/m", '{"storage_key": ""}')[0].storage_key is None


def test_parse_model_refuses_an_empty_path_without_storage() -> None:
    with pytest.raises(InvalidRequest, match="path is empty"):
        parse_model("", "{}")
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse_model("/m", "{")


def look(path: Path, **policy: bool) -> object:
    return inspect(path, Policy(**policy))


def test_inspect_names_the_sizes_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(
        LoadFailed,
        match=rf"model\.safetensors is truncated: {len(whole) - 100} bytes, its header describes {len(whole)}",
    ):
        look(tmp_path / "m")
    weights.write_bytes(whole[:5])
    with pytest.raises(LoadFailed, match="truncated"):
        look(tmp_path / "m")
    weights.write_bytes(b"\xff" * 1000)
    with pytest.raises(LoadFailed, match="not a safetensors file"):
        look(tmp_path / "m")
    weights.unlink()
    with pytest.raises(LoadFailed, match="no weights"):
        look(tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoadFailed, match="pickled"):
        look(tmp_path / "m")
    assert inspect(tmp_path / "m", Policy(allow_pickle=True)).kind is CheckpointKind.PICKLE
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(LoadFailed, match=r"config\.json"):
        look(tmp_path / "m")


def test_inspect_names_a_missing_or_outside_shard(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m", shard="100KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "m").glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(LoadFailed, match=rf"{shard.name} is missing"):
        look(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere"}}))
    with pytest.raises(LoadFailed, match="outside the checkpoint"):
        look(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Model"}, "model_type": "own_thing"}, "own code"),
    ],
)
def test_inspect_refuses_unsupported_checkpoints(tmp_path: Path, change: dict[str, object], named: str) -> None:
    tiny_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LoadFailed, match=named):
        look(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Model"}})
    )
    look(tmp_path / "m")  # transformers has the architecture: the code beside it is never run


def test_configure_help_shows_variables_and_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        configure(["--help"], {})
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: repertory serve-runtime ")
    assert "(default unix:/tmp/repertory/runtime.sock) [REPERTORY_LISTEN]" in text
    assert "--http-max-body SIZE largest HTTP request body (default 8MiB) [REPERTORY_HTTP_MAX_BODY_BYTES]" in text


def test_inspect_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    (tmp_path / "m.gguf").write_bytes(b"not gguf")
    with pytest.raises(LoadFailed, match=r"must be \.gguf"):
        look(tmp_path / "m.bin")
    with pytest.raises(LoadFailed, match="not a GGUF file"):
        look(tmp_path / "m.gguf")
    tiny_llama(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(LoadFailed, match="no tokenizer"):
        look(tmp_path / "m")


def test_needs_of_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    found = inspect(tmp_path / "m", Policy())
    geometry = geometry_of(found.config)
    needs = needs_of(geometry, found.tensors, ModelSettings(), "cpu")
    assert needs.num_parameters == sum(p.numel() for p in model.parameters())
    assert needs.weight_bytes == 4 * needs.num_parameters
    assert needs.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert needs.min_kv_bytes == 256 * needs.kv_bytes_per_token
    smaller = needs_of(geometry, found.tensors, ModelSettings(quantize=Quantization.NF4, max_model_len=64), "cpu")
    assert smaller.weight_bytes < needs.weight_bytes
    assert smaller.max_model_len == 64
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, tmp_path / "m" / "model.safetensors")
    assert (
        needs_of(geometry, inspect(tmp_path / "m", Policy()).tensors, ModelSettings(), "cpu").weight_bytes
        == needs.weight_bytes
    )


@pytest.mark.parametrize(
    ("config", "on_gpu"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"text_config": {}, "dtype": "float16"}, "float16"),
        ({"dtype": "float8_e4m3fn"}, "bfloat16"),
        ({}, "bfloat16"),
    ],
)
def test_compute_dtype_by_device(config: dict[str, object], on_gpu: str) -> None:
    assert compute_dtype("auto", checkpoint_dtype(config), "cuda") == on_gpu
    assert compute_dtype("auto", checkpoint_dtype(config), "cpu") == "float32"
    assert compute_dtype("float16", checkpoint_dtype(config), "cpu") == "float16"


def test_read_gguf_states_no_dtype() -> None:
    config, tensors = read_gguf(gguf_path())
    on_gpu, on_cpu = (needs_of(geometry_of(config), tensors, ModelSettings(), device) for device in ("cuda", "cpu"))
    assert (on_gpu.dtype, on_cpu.dtype) == ("bfloat16", "float32")
    assert on_cpu.weight_bytes == 2 * on_gpu.weight_bytes
