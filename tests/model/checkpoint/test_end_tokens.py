"""The end tokens of a checkpoint are the union of those that its files name."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from runtime.checkpoint.end_tokens import end_token_ids
from runtime.errors import LoadFailed


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content))


def tokenizer(folder: Path, *added: str) -> None:
    vocabulary = {"a": 0, "<turn>": 1, "<end>": 2}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.add_special_tokens(list(added))
    made.save(str(folder / "tokenizer.json"))


def test_end_token_ids_joins_all_files(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 3, 7]})
    write(tmp_path, "config.json", {"eos_token_id": 5})
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<turn>"})
    tokenizer(tmp_path, "<turn>")
    assert end_token_ids(tmp_path, 9, 100) == (7, 3, 5, 1)


@pytest.mark.parametrize("spelling", ["<end>", {"content": "<end>", "lstrip": False}])
def test_end_token_ids_reads_a_token_of_the_vocabulary(tmp_path: Path, spelling: object) -> None:
    write(tmp_path, "tokenizer_config.json", {"eos_token": spelling})
    tokenizer(tmp_path)
    assert end_token_ids(tmp_path, None, 100) == (2,)


def test_end_token_ids_prefers_the_tokenizer_config_id(tmp_path: Path) -> None:
    write(
        tmp_path, "tokenizer_config.json", {"eos_token": "<end>", "added_tokens_decoder": {"41": {"content": "<end>"}}}
    )
    assert end_token_ids(tmp_path, None, 100) == (41,)


def test_end_token_ids_reads_an_added_token_of_a_unigram_tokenizer(tmp_path: Path) -> None:
    made = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>"})
    assert end_token_ids(tmp_path, None, 100) == (2,)
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<unknown>"})
    assert end_token_ids(tmp_path, None, 100) == ()


def test_end_token_ids_falls_back_to_the_class_default(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {"model_type": "llama"})
    assert end_token_ids(tmp_path, 2, 100) == (2,)
    assert end_token_ids(tmp_path, None, 100) == ()


def test_end_token_ids_leaves_out_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": [99, 100, -1]})
    assert end_token_ids(tmp_path, None, 100) == (99,)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_end_token_ids_names_a_damaged_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{")
    with pytest.raises(LoadFailed, match=name.replace(".", r"\.")):
        end_token_ids(tmp_path, None, 100)
