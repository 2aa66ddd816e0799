"""Checkpoints that nobody's tools wrote: headers, indexes and configurations that are made to mislead, and paths that lead nowhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import LoadFailed
from runtime.puller.checkpoint_check import Policy, inspect
from runtime.puller.safetensors_header import parse_header
from runtime.puller.sources.resolve import locate
from runtime.types import ModelSource
from tests.support.llama_checkpoints import tiny_llama
from tests.support.sources import OPEN

WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}}, "whole numbers"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, "whole numbers"),
        ({"a": WHOLE, "b": {**WHOLE, "data_offsets": [4, 12]}}, "over each other"),
        ({"a": {**WHOLE, "dtype": "F4"}}, "cannot be read"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]}}, "cannot be read"),
        ({"a": WHOLE, "__metadata__": {"quantization": ["nf4"]}}, "not text"),
        ({"a": WHOLE, "__metadata__": 5}, "cannot be read"),
        ([WHOLE], "cannot be read"),
    ],
)
def test_read_header_refuses_misleading_headers(header: Any, named: str) -> None:
    with pytest.raises(LoadFailed, match=rf"^m\.safetensors .*{named}"):
        parse_header("m.safetensors", json.dumps(header).encode())


def test_inspect_refuses_deeply_nested_json(tmp_path: Path) -> None:
    deep = b'{"a":' + b"[" * 200_000
    with pytest.raises(LoadFailed, match="cannot be read"):
        parse_header("m.safetensors", deep)
    tiny_llama(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(deep)
    with pytest.raises(LoadFailed, match=r"config\.json is not valid JSON"):
        inspect(tmp_path / "m", Policy())


def test_inspect_refuses_an_oversized_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.puller.checkpoint_check.LARGEST_JSON_BYTES", 5000)
    tiny_llama(tmp_path / "m")
    inspect(tmp_path / "m", Policy())
    with (tmp_path / "m" / "config.json").open("a") as file:
        file.write(" " * 5000)
    with pytest.raises(LoadFailed, match=r"config\.json is larger than 5000 bytes"):
        inspect(tmp_path / "m", Policy())


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bitsandbytes' 'nf5'"),
        ("gptq", "str, not an object"),
        ([], "list, not an object"),
    ],
)
def test_inspect_names_an_unknown_quantisation(tmp_path: Path, stored: object, named: str) -> None:
    tiny_llama(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": stored}))
    with pytest.raises(LoadFailed, match=named):
        inspect(tmp_path / "m", Policy())


def test_inspect_names_unusable_paths(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (str(tmp_path / "loop" / "m"), f"/{'a' * 5000}", f"/{'b/' * 3000}"):
        with pytest.raises(LoadFailed, match=r"cannot be used|no such file"):
            locate(ModelSource(path), OPEN)
