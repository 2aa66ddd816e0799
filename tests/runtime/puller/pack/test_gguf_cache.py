"""A GGUF file's header is parsed once for all that transformers makes of it."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoConfig, AutoTokenizer

from runtime.puller.pack.gguf_cache import read_once
from tests.support.smollm2 import gguf_path


def test_one_parse_serves_configuration_and_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    parses: list[Any] = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: Any, *args: Any) -> None:
            parses.append(path)
            super().__init__(path, *args)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    path: Path = gguf_path()
    with read_once():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert len(parses) == 1
    assert config.hidden_size == 576
    assert tokenizer.decode(tokenizer.encode("read once")) == "read once"
    assert gguf.GGUFReader is Counting
