"""A packed directory has the files beside the weights that the model needs, and no others."""

import json
from pathlib import Path

from runtime.puller.checkpoint_check import Policy, inspect
from runtime.puller.pack.aux_files import copy_beside
from tests.support.llama_checkpoints import tiny_llama

MODULES = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}


def test_copy_beside_takes_the_modules_of_sentence_transformers(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    for name in (*MODULES, "2_Dense/pytorch_model.bin", "1_epoch/model.safetensors", "modules.json"):
        (tmp_path / "m" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "m" / name).write_text(json.dumps({"name": name}))
    (tmp_path / "out").mkdir()
    copy_beside(tmp_path / "m", tmp_path / "out")
    copied = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {name for name in copied if "/" in name} == MODULES
    assert "modules.json" in copied
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == '{"name": "2_Dense/model.safetensors"}'


def test_identity_of_a_checkpoint_follows_its_dense_weights(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m")
    weights = tmp_path / "m" / "2_Dense" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"a")
    before = inspect(tmp_path / "m", Policy()).identity
    weights.write_bytes(b"bc")
    assert inspect(tmp_path / "m", Policy()).identity != before
