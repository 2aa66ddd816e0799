"""A model, a server and a client that several modules of this folder share."""

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from runtime.config.schema import RuntimeConfig
from runtime.interfaces import ServedModel
from tests.support import inference_server
from tests.support import tokenizers as tiny
from tests.support.openai_server import TEXT, Server, serve
from tests.support.scripted_engine import ScriptedEngine, served


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.byte_level(tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ServedModel:
    return served(model_dir, "m1")


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    """A server whose engine answers every prompt with `TEXT`."""
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve(
        ScriptedEngine(lambda asked: [*tokens, 0]), model, config=RuntimeConfig(http_max_body_bytes=200_000)
    ) as found:
        yield found


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as found:
        yield found


@pytest.fixture(scope="module")
def short_model(model_dir: Path) -> ServedModel:
    """A model with a context of 200 tokens."""
    return served(model_dir, "m1", max_model_len=200)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.sentencepiece(tmp_path_factory.mktemp("l")), "llama", max_model_len=200)


@pytest.fixture
async def services(short_model: ServedModel) -> AsyncIterator[inference_server.Services]:
    """A gRPC server whose engine answers every prompt with `inference_server.TEXT`."""
    tokens = short_model.text.encode(inference_server.TEXT, add_special_tokens=False)
    async with inference_server.serve_grpc(
        ScriptedEngine(lambda asked: [*tokens, 0]), short_model, config=inference_server.CONFIG
    ) as found:
        yield found
