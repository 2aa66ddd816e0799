"""Malformed requests are refused with 400 as OpenAI does, and what is well-formed but missing here with 501."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from runtime.interfaces import ServedModel
from tests.runtime.api.test_tools import HERMES
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

USER = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "a"}'}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m"), chat_template=HERMES), "m1", max_model_len=500)


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    async with serve(ScriptedEngine(lambda asked: [5]), model) as found:
        yield found


async def post(server: Server, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.post(server.url + path, json={"model": "m1", **body}) as answer:
        return answer.status, await answer.json()


def part(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [fields]}


@pytest.mark.parametrize(
    ("turn", "status", "param"),
    [
        (part(type="image_url", image_url={"url": "data:"}), 501, "messages[0].content[0]"),
        (part(type="input_audio", input_audio={}), 501, "messages[0].content[0]"),
        (part(type="picture"), 400, "messages[0].content[0]"),
        (part(type=7), 400, "messages[0].content[0]"),
        (part(type=None), 400, "messages[0].content[0]"),
        (part(type="text"), 400, "messages[0].content[0]"),
        (part(type="text", text=7), 400, "messages[0].content[0]"),
        ({"role": "judge", "content": "a"}, 400, "messages[0].role"),
        ({"role": "", "content": "a"}, 400, "messages[0].role"),
        ({"role": "user", "content": None}, 400, "messages[0].content"),
        ({"role": "user"}, 400, "messages[0].content"),
        ({"role": "system", "content": None}, 400, "messages[0].content"),
        ({"role": "tool", "tool_call_id": "1"}, 400, "messages[0].content"),
        ({"role": "assistant", "content": None}, 400, "messages[0].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, 400, "messages[0].content"),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, 200, None),
        ({"role": "assistant", "tool_calls": [CALL]}, 200, None),
        ({"role": "assistant", "reasoning_content": "Hm."}, 200, None),
        ({"role": "developer", "content": "a"}, 200, None),
        ({"role": "user", "content": []}, 200, None),
    ],
)
async def test_chat_checks_messages_as_openai_does(
    server: Server, turn: dict[str, Any], status: int, param: str | None
) -> None:
    found, answer = await post(server, "/v1/chat/completions", {"messages": [turn, USER]})
    assert (found, answer.get("error", {}).get("param")) == (status, param), answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_stream_options_need_a_stream(server: Server, path: str) -> None:
    body: dict[str, Any] = {"messages": [USER]} if "chat" in path else {"prompt": "a"}
    for stream in ({}, {"stream": False}, {"stream": None}):
        status, answer = await post(server, path, {**body, **stream, "stream_options": {"include_usage": True}})
        assert (status, answer["error"]["param"]) == (400, "stream_options")
        assert (await post(server, path, {**body, **stream, "stream_options": None}))[0] == 200


async def test_integers_may_be_written_as_whole_floats(server: Server) -> None:
    body = {"prompt": [5.0, 6], "max_tokens": 3.0, "n": 2.0, "seed": 1e3, "stop_token_ids": [7.0], "temperature": 1}
    status, answer = await post(server, "/v1/completions", body)
    assert (status, len(answer["choices"])) == (200, 2)
    request = server.engine.asked[0].request
    assert (request.prompt, request.stop.max_tokens, request.stop.stop_token_ids) == ((5, 6), 3, (7,))
    assert request.sampling.seed == 1000
    for field, value in (("max_tokens", 1.5), ("n", "2"), ("n", True)):
        status, answer = await post(server, "/v1/completions", {"prompt": "a", "seed": 1.0, field: value})
        assert (status, answer["error"]["param"]) == (400, field), answer


async def test_number_that_is_out_of_range_is_refused_by_its_fields_name(server: Server) -> None:
    body = b'{"model": "m1", "prompt": "a", "temperature": 1e400}'
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/completions", data=body) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "temperature")


async def test_unknown_fields_are_escaped_in_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    await post(server, "/v1/completions", {"prompt": "a", "a\n2026 INFO forged\x1b[2J": 1, "b" * 200: 2})
    [line] = [record.getMessage() for record in caplog.records if "unknown fields" in record.getMessage()]
    assert line == "unknown fields were ignored: a?2026?INFO?forged??2J, " + "b" * 64


TURN: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "mood": 1, "x": None}],
}
OUTPUT = [{"type": "input_text", "text": "a", "mood": 1}]
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "a", "mood": 1}]}
TOOL_USE: dict[str, Any] = {
    "type": "tool_use",
    "id": "t",
    "name": "f",
    "input": {},
    "mood": 1,
    "cache_control": {"type": "ephemeral"},
}


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/v1/chat/completions", {"messages": [USER, TURN]}, "messages.1.content.1.mood"),
        ("/v1/responses", {"input": [{"role": "user", "content": OUTPUT}]}, "input.0.content.0.mood"),
        (
            "/v1/responses",
            {"input": [{"type": "function_call_output", "call_id": "c", "output": OUTPUT}]},
            "input.0.output.0.mood",
        ),
        ("/v1/messages", {"max_tokens": 5, "messages": [TURN]}, "messages.0.content.1.mood"),
        (
            "/v1/messages",
            {
                "max_tokens": 5,
                "system": TURN["content"],
                "messages": [USER, {"role": "assistant", "content": [TOOL_USE]}],
            },
            "system.1.mood, messages.1.content.0.mood",
        ),
        (
            "/v1/messages/count_tokens",
            {"messages": [{"role": "user", "content": [RESULT]}]},
            "messages.0.content.0.content.0.mood",
        ),
    ],
)
async def test_unknown_fields_of_content_parts_are_named(
    server: Server, path: str, body: dict[str, Any], names: str
) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.url}{path}", json={"model": "m1", **body}) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["Warning"] == f'299 repertory "unknown fields were ignored: {names}"'


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({"type": "image", "source": {}}, 501),
        ({"type": "picture"}, 400),
        ({"text": "a"}, 400),
        ({"type": 7}, 400),
    ],
)
async def test_messages_tells_unknown_blocks_from_unsupported_ones(
    server: Server, content: dict[str, Any], status: int
) -> None:
    body = {"max_tokens": 5, "messages": [{"role": "user", "content": [content]}]}
    assert (await post(server, "/v1/messages", body))[0] == status


@pytest.mark.parametrize(
    ("item", "status"),
    [
        ({"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}, 501),
        ({"role": "user", "content": [{"type": "picture"}]}, 400),
        ({"role": "judge", "content": "a"}, 400),
        ({"type": "item_reference", "id": "x"}, 501),
        ({"type": 7}, 400),
        ({}, 400),
    ],
)
async def test_responses_tells_unknown_items_from_unsupported_ones(
    server: Server, item: dict[str, Any], status: int
) -> None:
    assert (await post(server, "/v1/responses", {"input": [item]}))[0] == status
