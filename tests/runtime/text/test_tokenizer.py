"""Faults of a tokenizer's files, and of the library that reads them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from tokenizers import Tokenizer

from common.model_key import DefaultSampling, ModelSettings
from runtime.api.http_errors import errors_as_json
from runtime.errors import InvalidRequest, LoadFailed
from runtime.text.text_model import load_text
from tests.support import tokenizers as tiny


def rewritten(folder: Path, **parts: Any) -> Path:
    path = tiny.byte_level(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


def test_tokenizer_panic_while_encoding_is_an_error_of_the_request(tmp_path: Path) -> None:
    text = load_text(rewritten(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0}), ModelSettings())
    for encode in (text.encode, text.encode_with_offsets):
        with pytest.raises(InvalidRequest, match="chunk size must be non-zero"):
            encode("the dog")


def test_tokenizer_panic_while_reading_is_a_failed_load(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    with pytest.raises(LoadFailed, match=r"tokenizer\.json cannot be read: .*precompiled_charsmap"):
        load_text(folder, ModelSettings())


async def test_errors_as_json_answers_a_panic_and_lets_a_cancellation_pass(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(
        str(rewritten(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0}) / "tokenizer.json")
    )

    async def panics(_: web.Request) -> web.StreamResponse:
        tokenizer.encode_batch_fast(["the dog"])
        raise AssertionError

    async def leaves(_: web.Request) -> web.StreamResponse:
        raise asyncio.CancelledError

    request = make_mocked_request("GET", "/")
    answer = await errors_as_json(request, panics)
    assert isinstance(answer, web.Response)
    assert answer.status == 500
    assert "internal error" in str(answer.text)
    with pytest.raises(asyncio.CancelledError):
        await errors_as_json(request, leaves)


def test_load_text_ignores_sampling_defaults_out_of_range(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.byte_level(tmp_path)
    given = {"min_p": 2, "temperature": -1, "top_p": 0.9, "top_k": -1, "repetition_penalty": 0, "max_new_tokens": 0}
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert load_text(folder, ModelSettings()).sampling == DefaultSampling(top_p=0.9)
    assert "generation_config.json: min_p=2" in caplog.text
    assert caplog.text.count("is ignored") == 5
