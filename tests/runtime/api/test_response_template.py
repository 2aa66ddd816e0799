"""Chats of checkpoints that describe their output themselves, through the official client: whole, streamed, with tools and grammars."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from runtime.interfaces import ServedModel
from tests.runtime.api.test_tools import HELLO, HERMES, WEATHER, other
from tests.support import response_templates as templates
from tests.support import tokenizers as tiny
from tests.support.grammars import GrammarReader
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

LOOSE: Any = other(WEATHER, "weather", strict=False)
CALL = '<|end|>(Hm.)I look. @weather#7{"city": "Köln"}@@'


def model_of(path: Path, name: str, chat_template: str, spec: Any) -> ServedModel:
    return served(
        tiny.byte_level(path / name, chat_template=chat_template, response_template=spec), name, max_model_len=2000
    )


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    models = (
        model_of(tmp_path, "own", HERMES, templates.OWN),  # the family's signs are there, and it writes something else
        model_of(tmp_path, "hermes", HERMES, templates.HERMES),
        model_of(tmp_path, "plain", tiny.CHATML, templates.OWN),
        model_of(tmp_path, "broken", HERMES, {"version": 9}),
    )
    async with serve(ScriptedEngine(lambda asked: [], eos=2), *models) as found:
        yield found


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def say(server: Server, text: str) -> None:
    server.engine.script = lambda asked: [*server.script(text), 2]


@pytest.mark.parametrize("model", ["own", "plain"])
async def test_response_template_wins_over_the_family(client: openai.AsyncOpenAI, server: Server, model: str) -> None:
    say(server, CALL)
    answer = await client.chat.completions.create(model=model, messages=HELLO, tools=[LOOSE])
    [choice] = answer.choices
    message: Any = choice.message
    assert (message.content, message.reasoning_content, choice.finish_reason) == ("I look.", "Hm.", "tool_calls")
    [call] = message.tool_calls
    assert (call.id, call.function.name, json.loads(call.function.arguments)) == ("7", "weather", {"city": "Köln"})
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens


async def test_response_template_streams(client: openai.AsyncOpenAI, server: Server) -> None:
    say(server, CALL)
    deltas: list[str] = []
    stream = await client.chat.completions.create(model="own", messages=HELLO, tools=[LOOSE], stream=True)
    async for chunk in stream:
        functions = [call.function for call in chunk.choices[0].delta.tool_calls or ()]
        deltas += [function.arguments or "" for function in functions if function is not None]
    assert json.loads("".join(deltas)) == {"city": "Köln"}
    assert len(deltas) > 5


async def test_plain_chats_of_such_a_model_are_split_too(client: openai.AsyncOpenAI, server: Server) -> None:
    say(server, "<|end|>(Hm.)Yes.%%not shown%%")
    answer = await client.chat.completions.create(model="plain", messages=HELLO)
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Hm.")


@pytest.mark.parametrize(
    ("model", "written"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'),
        ("own", '[{"name": "weather", "parameters": {"city": "Paris"}}]'),
    ],
)
async def test_required_calls_are_written_and_read_in_one_format(
    client: openai.AsyncOpenAI, server: Server, tmp_path: Path, model: str, written: str
) -> None:
    say(server, written)
    answer = await client.chat.completions.create(model=model, messages=HELLO, tools=[WEATHER], tool_choice="required")
    calls: Any = answer.choices[0].message.tool_calls
    [call] = calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    grammar = server.engine.asked[-1].request.grammar
    assert grammar is not None
    reader = GrammarReader(tiny.byte_level(tmp_path / "reader"))
    assert reader.accepts(grammar, written)
    assert not reader.accepts(grammar, "Hello.")


@pytest.mark.parametrize("fields", [{"tools": [WEATHER]}, {"tools": [LOOSE], "response_format": {"type": "json_object"}}])  # fmt: skip
async def test_response_template_refuses_what_no_grammar_can_enforce(
    client: openai.AsyncOpenAI, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match="response_template is in no layout"):
        await client.chat.completions.create(model="own", messages=HELLO, **fields)


async def test_response_template_of_another_version_leaves_the_family(
    client: openai.AsyncOpenAI, server: Server
) -> None:
    say(server, '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>')
    answer = await client.chat.completions.create(model="broken", messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "tool_calls"
