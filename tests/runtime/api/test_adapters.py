"""Adapters in the requests of a runtime that is called directly, or under a mesh that has chosen the adapter already."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from runtime.interfaces import ServedModel
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    base = served(tiny.byte_level(tmp_path_factory.mktemp("m")), "base")
    other = replace(base, model_id="other", name="other")
    adapters = [
        replace(base, model_id=f"{name}__1", name=name, base_id="base", base_name="base") for name in ("sql", "legal")
    ]
    return [base, other, *adapters]


@pytest.fixture
async def server(models: list[ServedModel]) -> AsyncIterator[Server]:
    async with serve(ScriptedEngine(lambda asked: [5, 0]), *models) as found:
        yield found


async def called(server: Server, path: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    """The status, and the id of the model that generated, or the error's text."""
    async with aiohttp.ClientSession() as http, http.post(server.url + path, json=body, headers=headers) as answer:
        text = await answer.text()
    return answer.status, server.engine.asked[-1].model_id if answer.status == 200 else text


PROMPT = {"prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("fields", "header", "model_id"),
    [
        ({"model": "base", "adapter_id": "sql"}, "", "sql__1"),
        ({"model": "base", "adapter_id": "sql__1"}, "", "sql__1"),
        ({"model": "base", "adapter_id": "legal", "adapter_source": "hub"}, "", "legal__1"),
        ({"model": "base", "lora_request": {"lora_name": "sql", "lora_path": "/x", "lora_int_id": 1}}, "", "sql__1"),
        ({"adapter_id": "sql"}, "", "sql__1"),
        ({"model": "base", "adapter_id": ""}, "", "base"),
        ({"model": "base", "adapter_id": "sql"}, "base", "sql__1"),
        ({"model": "base", "adapter_id": "an alias of the mesh"}, "sql__1", "sql__1"),
    ],
)
async def test_completions_select_an_adapter(
    server: Server, fields: dict[str, Any], header: str, model_id: str
) -> None:
    headers = {"mm-model-id": header} if header else {}
    assert await called(server, "/v1/completions", {**PROMPT, **fields}, **headers) == (200, model_id)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "other", "adapter_id": "sql"},
        {"model": "base", "adapter_id": "nobody"},
        {"model": "base", "adapter_id": "other"},
        {"model": "base", "lora_request": {"lora_name": "nobody"}},
    ],
)
async def test_completions_refuse_what_is_no_adapter_of_the_model(server: Server, fields: dict[str, Any]) -> None:
    status, text = await called(server, "/v1/completions", {**PROMPT, **fields})
    assert (status, "is not an adapter of it that is loaded here" in text) == (400, True)
    assert not server.engine.asked


async def test_tgi_selects_an_adapter_of_the_model_in_its_path(server: Server) -> None:
    body = {"inputs": "a", "parameters": {"adapter_id": "sql"}}
    assert await called(server, "/tgi/base/generate", body) == (200, "sql__1")
    assert await called(server, "/generate", body) == (200, "sql__1")
    assert await called(server, "/tgi/base/generate", body, **{"mm-model-id": "legal__1"}) == (200, "legal__1")
    status, text = await called(server, "/tgi/other/generate", body)
    assert (status, "parameters.adapter_id 'sql' is not an adapter" in text) == (422, True)
    merged = {"inputs": "a", "parameters": {"adapter_parameters": {"ids": ["sql", "legal"]}}}
    assert (await called(server, "/tgi/base/generate", merged))[0] >= 400
