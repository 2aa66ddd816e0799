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
from tests.support.grammars import GrammarReader
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


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> GrammarReader:
    return GrammarReader(tiny.byte_level(tmp_path_factory.mktemp("reader")))


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


def other(tool: dict[str, Any], name: str, **function: Any) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "name": name, **function}}


NAMED = {"type": "function", "function": {"name": "weather"}}
TIME = other(WEATHER, "time", parameters={"type": "object", "properties": {}, "additionalProperties": False})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


@pytest.mark.parametrize(
    ("fields", "accepted", "rejected"),
    [
        ({"tool_choice": "required"}, [CALL, TIME_CALL, f"{CALL}\n{TIME_CALL}"], ["", "Hello.", f"I look. {CALL}"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL], [f"{CALL}\n{TIME_CALL}"]),
        ({"tool_choice": NAMED}, [CALL], [TIME_CALL, f"{CALL}\n{CALL}", "Hello."]),
        ({"tool_choice": allowed("required", TIME)}, [TIME_CALL], [CALL, "Hello."]),
        ({}, ["Hello.", CALL, f"I look. {CALL}"], [CALL.replace("city", "town"), f"I look. {CALL[:-20]}x"]),
        ({"tool_choice": allowed("auto", WEATHER)}, ["Hello.", CALL], [TIME_CALL]),
        ({"response_format": {"type": "json_object"}}, ["{}", CALL, TIME_CALL], ["Hello."]),
    ],
)
async def test_tools_grammar_follows_the_choice(
    server: Server, reader: GrammarReader, fields: dict[str, Any], accepted: list[str], rejected: list[str]
) -> None:
    body = {
        "model": "m1",
        "messages": HELLO,
        "tools": [other(WEATHER, "weather", strict=True), other(TIME, "time", strict=True)],
        **fields,
    }
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert (response.status, "Warning" in response.headers) == (200, False), await response.text()
    grammar = server.engine.asked[-1].request.grammar
    assert grammar is not None
    assert [reader.accepts(grammar, text) for text in accepted] == [True] * len(accepted)
    assert [reader.accepts(grammar, text) for text in rejected] == [False] * len(rejected)


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}, {"tool_choice": "none"}])
async def test_calls_that_the_model_chooses_are_free_unless_a_function_is_strict(
    server: Server, fields: dict[str, Any]
) -> None:
    body = {"model": "m1", "messages": HELLO, "tools": [other(WEATHER, "weather", strict=False)], **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.status == 200
    assert server.engine.asked[-1].request.grammar is None


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
async def test_tools_finish_reason_of_a_named_function_is_stop(
    client: openai.AsyncOpenAI, server: Server, choice: Any, reason: str
) -> None:
    say(server, CALL)
    answer = await client.chat.completions.create(model="m1", messages=HELLO, tools=[WEATHER], tool_choice=choice)
    assert (answer.choices[0].finish_reason, len(answer.choices[0].message.tool_calls or ())) == (reason, 1)
    stream = await client.chat.completions.create(
        model="m1", messages=HELLO, tools=[WEATHER], tool_choice=choice, stream=True
    )
    reasons = [chunk.choices[0].finish_reason async for chunk in stream if chunk.choices]
    assert [found for found in reasons if found] == [reason]


async def test_tools_refuse_a_strict_function_that_cannot_be_enforced(server: Server) -> None:
    odd = other(WEATHER, "f", strict=True, parameters={"properties": {"a": {"type": "array", "uniqueItems": True}}})
    body = {"model": "m1", "messages": HELLO, "tools": [WEATHER, odd]}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/chat/completions", json=body) as response:
        error = (await response.json())["error"]
        assert (response.status, error["param"]) == (400, "tools")
        assert 'tools[1].function.parameters.properties.a: the keyword "uniqueItems"' in error["message"]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (
            "required",
            '[{"name": "weather", "parameters": {"city": "Paris"}}, {"name": "weather", "parameters": {"city": "Bonn"}}]',
        ),
        (NAMED, '[{"name": "weather", "parameters": {"city": "Paris"}}]'),
    ],
)
async def test_tools_of_a_family_without_a_format_are_called_as_json(tmp_path: Path, choice: Any, text: str) -> None:
    plain = served(tiny.byte_level(tmp_path / "m"), "m2", max_model_len=500)
    async with (
        serve(ScriptedEngine(lambda asked: []), plain) as found,
        openai.AsyncOpenAI(base_url=f"{found.url}/v1", api_key="none", max_retries=0) as client,
    ):
        say(found, text)
        answer = await client.chat.completions.create(model="m2", messages=HELLO, tools=[WEATHER], tool_choice=choice)
        calls: Any = answer.choices[0].message.tool_calls
        expected = [(call["name"], call["parameters"]) for call in json.loads(text)]
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == expected
        grammar = found.engine.asked[-1].request.grammar
    assert grammar is not None
    reader = GrammarReader(tmp_path / "m")
    assert reader.accepts(grammar, text)
    assert not reader.accepts(grammar, "Hello.")


@pytest.mark.parametrize(
    ("fields", "model_name", "note"),
    [
        ({"reasoning_effort": "low"}, "m2", "reasoning_effort has no effect"),
        ({"reasoning_effort": "none"}, "m2", ""),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "m2", "does not reason first"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "m1", ""),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "m2", ""),
    ],
)
async def test_reasoning_that_the_template_does_not_read_is_noted(
    model: ServedModel, tmp_path: Path, fields: dict[str, Any], model_name: str, note: str
) -> None:
    plain = served(tiny.byte_level(tmp_path / "m"), "m2", max_model_len=500)
    async with serve(ScriptedEngine(lambda asked: [5]), model, plain) as found, aiohttp.ClientSession() as http:
        body = {"model": model_name, "messages": HELLO, **fields}
        async with http.post(f"{found.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            assert note in response.headers.get("Warning", "")
            assert bool(note) == ("Warning" in response.headers)


async def test_history_as_the_official_client_sends_it_has_no_unknown_fields(server: Server) -> None:
    say(server, CALLS)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="m1", messages=HELLO, tools=[WEATHER])
        made: Any = answer.choices[0].message
        turns: Any = [*HELLO, made.model_dump()]
        for index, call in enumerate(turns[-1]["tool_calls"]):
            call["index"] = index
            turns.append({"role": "tool", "tool_call_id": call["id"], "content": "rain"})
        again = await client.chat.completions.with_raw_response.create(model="m1", messages=turns, tools=[WEATHER])
        assert "Warning" not in again.headers


async def test_tools_that_the_template_does_not_show_are_noted(server: Server, tmp_path: Path) -> None:
    plain = served(tiny.byte_level(tmp_path / "m"), "m2", max_model_len=500)
    async with serve(ScriptedEngine(lambda asked: []), plain) as found:
        say(found, '[{"name": "weather", "parameters": {"city": "Paris"}}]')
        body = {"messages": HELLO, "tools": [WEATHER], "tool_choice": "required"}
        for url, model, noted in ((found.url, "m2", True), (server.url, "m1", False)):
            async with (
                aiohttp.ClientSession() as http,
                http.post(f"{url}/v1/chat/completions", json={"model": model, **body}) as response,
            ):
                assert response.status == 200
                assert ("does not see the tools" in response.headers.get("Warning", "")) is noted


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tool_choice": "required", "tools": []}, 400, "tools"),
        ({"tools": []}, 400, "tools"),
        ({"tool_choice": allowed("required", other(WEATHER, "f"))}, 400, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "tools[0].function"),
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
