"""Anthropic's Messages API through the official client: whole and streamed messages, tools, thinking, counts and errors."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import pytest

from runtime.api.anthropic.as_chat import as_chat
from runtime.api.anthropic.types import MessagesBody, Turn
from runtime.errors import InvalidRequest, Overloaded
from runtime.interfaces import ServedModel
from tests.runtime.api.test_tools import CALLS, HERMES, prompt_of, say
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

TOOLS: Any = [
    {
        "name": "weather",
        "description": "Says the weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path: Path = tmp_path_factory.mktemp("m")
    return served(tiny.byte_level(path, chat_template=HERMES), "m1", max_model_len=2000)


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    async with serve(ScriptedEngine(lambda asked: []), model) as found:
        say(found, CALLS)
        yield found


@pytest.fixture
async def client(server: Server) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


def assert_calls(message: Any) -> None:
    thinking, text, first, second = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", "Hm.")
    assert (text.type, text.text) == ("text", "I look.")
    assert (first.type, first.name, first.input, second.input) == (
        "tool_use",
        "weather",
        {"city": "Köln"},
        {"city": "Paris"},
    )
    assert first.id != second.id
    assert (message.stop_reason, message.role, message.model) == ("tool_use", "assistant", "m1")


async def test_messages_answers_with_thinking_and_tools(client: anthropic.AsyncAnthropic, server: Server) -> None:
    message = await client.messages.create(model="m1", max_tokens=1000, messages=HELLO, tools=TOOLS, system="Be brief.")
    assert_calls(message)
    asked = server.engine.asked[0].request
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == len(asked.prompt)
    assert message.usage.output_tokens == len(server.script(CALLS)) + 1
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt_of(server)


async def test_messages_streams_thinking_and_tools(client: anthropic.AsyncAnthropic, server: Server) -> None:
    async with client.messages.stream(model="m1", max_tokens=1000, messages=HELLO, tools=TOOLS) as stream:
        names = [event.type async for event in stream]
        message = await stream.get_final_message()
    assert_calls(message)
    assert message.usage.output_tokens == len(server.script(CALLS)) + 1
    assert (names[0], names[-1]) == ("message_start", "message_stop")
    assert names.count("content_block_start") == names.count("content_block_stop") == 4
    assert names.count("input_json") > 6


async def test_messages_passes_parameters_and_stops(client: anthropic.AsyncAnthropic, server: Server) -> None:
    say(server, "one two END three")
    fields: Any = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["END"]}
    message: Any = await client.messages.create(model="m1", max_tokens=10_000, messages=HELLO, extra_body=fields)
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ("stop_sequence", "END", "one two ")
    asked = server.engine.asked[0].request
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (0.5, 0.9, 7)
    assert asked.stop.max_tokens == 2000 - len(asked.prompt)
    short = await client.messages.create(model="m1", max_tokens=2, messages=HELLO)
    assert short.stop_reason == "max_tokens"


async def test_messages_renders_earlier_turns(client: anthropic.AsyncAnthropic, server: Server) -> None:
    say(server, "It rains.")
    history: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain "}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    message: Any = await client.messages.create(model="m1", max_tokens=50, messages=history, tools=TOOLS)
    assert (message.content[0].text, message.stop_reason) == ("It rains.", "end_turn")
    prompt = prompt_of(server)
    assert "<tool_call>Köln toolu_1</tool_call>" in prompt
    assert "<|im_start|>tool\nrain weather toolu_1<|im_end|>\n<|im_start|>user\nAnd?" in prompt


async def test_messages_count_tokens(client: anthropic.AsyncAnthropic, server: Server) -> None:
    counted = await client.messages.count_tokens(model="m1", messages=HELLO, tools=TOOLS)
    assert not server.engine.asked
    await client.messages.create(model="m1", max_tokens=1, messages=HELLO, tools=TOOLS)
    assert counted.input_tokens == len(server.engine.asked[0].request.prompt)


@pytest.mark.parametrize(
    ("thinking", "expected"), [(None, None), ("disabled", False), ("enabled", True), ("adaptive", True)]
)
def test_as_chat_switches_thinking(thinking: str | None, expected: bool | None) -> None:
    given = None if thinking is None else {"type": thinking}
    chat = as_chat(MessagesBody(messages=[Turn("user", "a")], max_tokens=1, thinking=given))
    assert (chat.chat_template_kwargs or {}).get("enable_thinking") is expected


@pytest.mark.parametrize(("kind", "expected"), [("enabled", 2048), ("adaptive", None), ("disabled", None)])
def test_as_chat_takes_the_budget_of_thinking(kind: str, expected: int | None) -> None:
    thinking = {"type": kind, "budget_tokens": 2048}
    chat = as_chat(MessagesBody(messages=[Turn("user", "a")], max_tokens=1, thinking=thinking))
    assert chat.thinking_token_budget == expected
    with pytest.raises(InvalidRequest, match="budget_tokens"):
        as_chat(MessagesBody(messages=[], max_tokens=1, thinking={"type": "enabled", "budget_tokens": "2"}))


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"messages": []}, 400, "invalid_request_error", "empty"),
        ({"model": "nobody"}, 404, "not_found_error", "nobody"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"tool_choice": {"type": "any"}, "tools": []}, 400, "invalid_request_error", "required"),
        ({"tool_choice": {"type": "some"}}, 400, "invalid_request_error", "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, 501, "invalid_request_error", "web_search"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 501, "invalid_request_error", "image"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_request_error", "lacks"),
        ({"messages": [{"role": "judge", "content": "a"}]}, 400, "invalid_request_error", "judge"),
    ],
)
async def test_messages_errors_have_the_protocols_shape(
    server: Server, fields: dict[str, Any], status: int, kind: str, words: str
) -> None:
    body = {"model": "m1", "max_tokens": 9, "messages": HELLO, "tools": TOOLS, **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/messages", json=body) as response:
        answer = await response.json()
        assert (response.status, answer["type"], answer["error"]["type"]) == (status, "error", kind)
        assert words in answer["error"]["message"]
        assert answer["error"].get("code") == ("model_not_found" if status == 404 else None)


async def test_messages_errors_of_the_engine(client: anthropic.AsyncAnthropic, server: Server) -> None:
    server.engine.raises = Overloaded("its queue is full", model="m1", retry_after_s=2)
    with pytest.raises(anthropic.RateLimitError, match="queue is full"):
        await client.messages.create(model="m1", max_tokens=9, messages=HELLO, stream=True)
    server.engine.raises, server.engine.fail_after = None, 2
    stream = await client.messages.create(model="m1", max_tokens=9, messages=HELLO, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the engine died"):
        async for _ in stream:
            pass
