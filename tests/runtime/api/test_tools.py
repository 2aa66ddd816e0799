"""Tool calls and reasoning of chats through the official client, streamed and whole, and what goes into the prompt."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from runtime.interfaces import ServedModel
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

HERMES = (
    "{% if tools %}# Tools{{ tools | tojson }}<tool_call></tool_call>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.city }} {{ call.id }}</tool_call>{% endfor %}"
    "{% if m.tool_call_id %}{{ m.name }} {{ m.tool_call_id }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined %}"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HELLO: Any = [{"role": "user", "content": "hello"}]
CALLS = (
    '<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
)


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
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def say(server: Server, text: str) -> None:
    server.engine.script = lambda asked: [*server.script(text), 0]


def prompt_of(server: Server) -> str:
    return server.model.text.decode(server.engine.asked[-1].request.prompt, skip_special_tokens=False)


async def test_chat_answers_with_tool_calls(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m1", messages=HELLO, tools=[WEATHER])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.model_extra == {"reasoning": "Hm.", "reasoning_content": "Hm."}
    calls: Any = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Köln"}, {"city": "Paris"}]
    assert len({call.id for call in calls}) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert 0 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) < answer.usage.completion_tokens


async def test_chat_streams_tool_calls(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        model="m1", messages=HELLO, tools=[WEATHER], stream_options={"include_usage": True}
    ) as stream:
        pieces = [
            event.arguments_delta async for event in stream if event.type == "tool_calls.function.arguments.delta"
        ]
        final = await stream.get_final_completion()
    message: Any = final.choices[0].message
    assert (message.content, message.reasoning_content) == ("I look.", "Hm.")
    assert [call.function.parsed_arguments for call in message.tool_calls] == [{"city": "Köln"}, {"city": "Paris"}]
    assert final.choices[0].finish_reason == "tool_calls"
    assert len(pieces) > 6
    assert final.usage is not None
    assert final.usage.completion_tokens_details is not None
    assert final.usage.completion_tokens_details.reasoning_tokens


async def test_chat_can_allow_one_call_only(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m1", messages=HELLO, tools=[WEATHER], parallel_tool_calls=False
    )
    assert len(answer.choices[0].message.tool_calls or ()) == 1


async def test_chat_with_choice_none_shows_no_tools(client: openai.AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(model="m1", messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].finish_reason == "stop"
    assert "<tool_call>" in (answer.choices[0].message.content or "")
    assert "# Tools" not in prompt_of(server)


async def test_chat_renders_tools_and_earlier_calls(client: openai.AsyncOpenAI, server: Server) -> None:
    say(server, "It rains.")
    history: Any = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain "}]},
    ]
    answer = await client.chat.completions.create(model="m1", messages=history, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].finish_reason == "stop"
    prompt = prompt_of(server)
    assert '"name": "weather"' in prompt
    assert "<tool_call>Köln call_1</tool_call>" in prompt
    assert "rain weather call_1" in prompt


async def test_chat_call_that_is_cut_is_content_when_whole(client: openai.AsyncOpenAI, server: Server) -> None:
    say(server, '<tool_call>{"name": "weather", "arguments": {"city": "Kö')
    answer = await client.chat.completions.create(model="m1", messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].message.content == '<tool_call>{"name": "weather", "arguments": {"city": "Kö'
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


async def test_chat_reasoning_can_be_left_out(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="m1", messages=HELLO, extra_body={"include_reasoning": False}, tools=[WEATHER]
    )
    assert answer.choices[0].message.content == "I look."
    assert not answer.choices[0].message.model_extra


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, "Hm.</think>Yes", ("Hm.", "Yes")),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "Hm.", ("Hm.", "")),
        ({"reasoning_effort": "none"}, "Yes", (None, "Yes")),
    ],
)
async def test_chat_reasoning_that_the_template_opened(
    client: openai.AsyncOpenAI, server: Server, fields: dict[str, Any], text: str, expected: tuple[str | None, str]
) -> None:
    say(server, text)
    answer = await client.chat.completions.create(model="m1", messages=HELLO, extra_body=fields)
    message = answer.choices[0].message
    assert ((message.model_extra or {}).get("reasoning_content"), message.content) == expected


async def test_chat_says_that_strict_is_not_enforced(server: Server) -> None:
    body = {"model": "m1", "messages": HELLO, "tools": [WEATHER]}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["Warning"].startswith('299 repertory "strict is not enforced')


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tool_choice": "required"}, 501, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, 501, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice"),
        ({"tool_choice": "some"}, 400, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, 501, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function"),
        ({"reasoning_effort": "much"}, 400, "reasoning_effort"),
    ],
)
async def test_plan_tools_refuses(server: Server, fields: dict[str, Any], status: int, param: str) -> None:
    body = {"model": "m1", "messages": HELLO, "tools": [WEATHER], **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (status, param)


async def test_plan_tools_names_a_model_without_a_format(tmp_path: Path) -> None:
    plain = served(tiny.byte_level(tmp_path / "m"), "m2")
    async with (
        serve(ScriptedEngine(lambda asked: [0]), plain) as found,
        openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="model m2: its chat template has no format of tool calls"):
            await client.chat.completions.create(model="m2", messages=HELLO, tools=[WEATHER])


async def test_chat_sees_markers_that_are_special_tokens(tmp_path: Path) -> None:
    template = "[TOOL_CALLS]{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.id }}{% endfor %}{% endfor %}"
    path = tiny.byte_level(
        tmp_path / "m", chat_template=template, additional_special_tokens=["[TOOL_CALLS]", "[ARGS]", "[HIDDEN]"]
    )
    async with (
        serve(ScriptedEngine(lambda asked: []), served(path, "m3")) as found,
        openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client,
    ):
        say(found, "Yes[HIDDEN].[TOOL_CALLS]weather[ARGS]{}")
        answer = await client.chat.completions.create(model="m3", messages=HELLO, tools=[WEATHER])
        message: Any = answer.choices[0].message
        assert (message.content, message.tool_calls[0].function.name) == ("Yes.", "weather")
        assert len(message.tool_calls[0].id) == 9
        history = [
            *HELLO,
            {"role": "assistant", "tool_calls": [{**message.tool_calls[0].model_dump(), "id": "call_1"}]},
        ]
        await client.chat.completions.create(
            model="m3", messages=history, tools=[WEATHER], extra_body={"add_generation_prompt": True}
        )
        assert "call_1" not in prompt_of(found)
