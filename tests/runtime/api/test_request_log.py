"""The runtime's line per HTTP request: tokens, waiting, times and the outcome, of whole answers, streams and failed streams."""

import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from runtime.api.http_app import build_http_app
from runtime.config.schema import RuntimeConfig
from runtime.errors import Unavailable
from runtime.interfaces import ServedModel
from runtime.observability.metrics import RuntimeMetrics
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import Directory, ScriptedEngine, served

TEXT = "The dog sleeps."
LOGGER = "runtime.api.request_log"


@pytest.fixture
async def server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Server]:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = served(tiny.byte_level(tmp_path), "m1")
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve(ScriptedEngine(lambda asked: [*tokens, 0]), model) as found:
        yield found


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == LOGGER]


async def post(server: Server, path: str, body: dict[str, Any], **headers: str) -> str:
    async with aiohttp.ClientSession() as http, http.post(server.url + path, json=body, headers=headers) as response:
        return await response.text()


@pytest.mark.parametrize("stream", [False, True])
async def test_log_counts_tokens_of_whole_answers_and_streams(
    stream: bool, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = server.script("The quick brown fox")
    await post(server, "/v1/completions", {"model": "m1", "prompt": prompt, "stream": stream, "max_tokens": 3})
    (line,) = lines(caplog)
    assert (line["code"], line["path"], line["model"]) == ("200", "/v1/completions", "m1")
    assert (line["prompt_tokens"], line["output_tokens"]) == (len(prompt), 3)
    assert 0 < line["first_s"] <= line["total_s"] + 0.001
    assert line["levelno"] == logging.INFO


async def test_log_has_the_name_and_the_wait_of_a_mesh(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"x-repertory-name": "caf%C3%A9", "x-repertory-waited": "12.5", "X-Request-Id": "mine"}
    await post(server, "/v1/completions", {"model": "m1", "prompt": "hi", "max_tokens": 1}, **headers)
    (line,) = lines(caplog)
    assert (line["asked"], line["wait_s"], line["request_id"]) == ("café", 12.5, "mine")
    assert line["total_s"] > 12.5


@pytest.mark.parametrize("waited", ["soon", "-3", "nan", "inf"])
async def test_log_ignores_a_wait_that_is_none(waited: str, server: Server, caplog: pytest.LogCaptureFixture) -> None:
    await post(server, "/v1/completions", {"model": "m1", "prompt": "hi"}, **{"x-repertory-waited": waited})
    assert lines(caplog)[0]["total_s"] < 10


async def test_log_of_a_refusal_has_its_status(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    await post(server, "/v1/completions", {"model": "nobody", "prompt": "hi"})
    assert lines(caplog)[0]["code"] == "404"


async def test_log_of_a_failed_stream_has_the_errors_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The client was sent status 200 before the engine failed."""
    caplog.set_level(logging.DEBUG, LOGGER)
    model = served(tiny.byte_level(tmp_path), "m1")
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve(ScriptedEngine(lambda asked: tokens, fail_after=2), model) as server:
        body = await post(server, "/v1/completions", {"model": "m1", "prompt": "hi", "stream": True})
    assert '"error"' in body
    assert lines(caplog)[0]["code"] == "UNAVAILABLE"


async def test_log_of_polls_is_at_debug(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with aiohttp.ClientSession() as http, http.get(f"{server.url}/v1/models") as response:
        assert response.status == 200
        assert "x-repertory-logged" not in response.headers
    assert lines(caplog)[0]["levelno"] == logging.DEBUG


class StartingDirectory(Directory):
    """No model can be asked for while the engine starts."""

    def list(self) -> Sequence[ServedModel]:
        raise Unavailable("the engine is starting")


@pytest.mark.parametrize(("path", "level"), [("/health", logging.DEBUG), ("/v1/models", logging.INFO)])
async def test_log_of_probes_during_the_start_is_at_debug(
    path: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A platform probes every few seconds, and starting takes minutes."""
    caplog.set_level(logging.DEBUG, LOGGER)
    engine = ScriptedEngine(lambda asked: [])
    app = build_http_app(StartingDirectory([]), engine, RuntimeConfig(), RuntimeMetrics())
    async with TestClient(TestServer(app)) as client, client.get(path) as response:
        assert response.status == 503
    (line,) = lines(caplog)
    assert (line["code"], line["levelno"]) == ("503", level)
