"""OpenAI's Responses API through the official client: whole and streamed, functions, reasoning, earlier items and refusals."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from runtime.interfaces import ServedModel
from tests.runtime.api.test_tools import CALLS, HERMES, prompt_of, say
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "strict": False,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]


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


def assert_calls(response: Any) -> None:
    reasoning, message, first, second = response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "Hm.")
    assert (message.type, message.content[0].text, response.output_text) == ("message", "I look.", "I look.")
    assert (first.type, first.name, first.arguments) == ("function_call", "weather", '{"city": "Köln"}')
    assert second.arguments == '{"city": "Paris"}'
    assert len({first.call_id, second.call_id, first.id, second.id}) == 4
    assert {item.status for item in response.output} == {"completed"}
    assert (response.status, response.model) == ("completed", "m1")
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens


async def test_responses_answers_with_reasoning_and_calls(client: openai.AsyncOpenAI, server: Server) -> None:
    response = await client.responses.create(model="m1", input="hello", instructions="Be brief.", tools=TOOLS)
    assert_calls(response)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>" in prompt_of(server)
    assert response.usage is not None
    assert response.usage.input_tokens == len(server.engine.asked[0].request.prompt)


async def test_responses_streams_reasoning_and_calls(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="m1", input="hello", tools=TOOLS) as stream:
        events = [event async for event in stream]
        response = await stream.get_final_response()
    assert_calls(response)
    names = [event.type for event in events]
    assert names[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert names[-1] == "response.completed"
    assert names.count("response.output_item.added") == names.count("response.output_item.done") == 4
    assert names.count("response.function_call_arguments.delta") > 6
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_responses_renders_earlier_items(client: openai.AsyncOpenAI, server: Server) -> None:
    say(server, "It rains.")
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Köln"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "rain "},
    ]
    response = await client.responses.create(model="m1", input=items, tools=TOOLS)
    assert (response.output_text, response.status) == ("It rains.", "completed")
    prompt = prompt_of(server)
    assert "<|im_start|>assistant\nI look.<tool_call>Köln call_1</tool_call><|im_end|>" in prompt
    assert "<|im_start|>tool\nrain weather call_1<|im_end|>" in prompt


async def test_responses_that_are_cut_are_incomplete(client: openai.AsyncOpenAI, server: Server) -> None:
    response = await client.responses.create(model="m1", input="a", max_output_tokens=3, temperature=0.5, top_p=0.9)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    asked = server.engine.asked[0].request
    assert (asked.stop.max_tokens, asked.sampling.temperature, asked.sampling.top_p) == (3, 0.5, 0.9)
    assert [item.to_dict()["status"] for item in response.output] == ["incomplete"]
    stream = await client.responses.create(model="m1", input="a", max_output_tokens=3, stream=True)
    *_, done, end = [event async for event in stream]
    assert done.type == "response.output_item.done"
    assert end.type == "response.incomplete"
    assert end.response.output == [done.item]
    assert done.item.to_dict()["status"] == "incomplete"


async def test_responses_stream_that_fails_says_so(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.fail_after = 2
    stream = await client.responses.create(model="m1", input="a", stream=True)
    last: Any = [event async for event in stream][-1]
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert "the engine died" in last.response.error.message


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"previous_response_id": "resp_1"}, 501, "previous_response_id"),
        ({"store": True}, 501, "store"),
        ({"conversation": "c"}, 501, "conversation"),
        ({"background": True}, 501, "background"),
        ({"text": {"format": {"type": "grammar"}}}, 400, "text.format"),
        ({"truncation": "auto"}, 501, "truncation"),
        ({"tool_choice": "required", "tools": []}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": []}, 400, "input"),
        ({"include": ["message.output_text.logprobs"]}, 501, "include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 501, "input[0]"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 501, "input[0]"),
    ],
)
async def test_responses_refuses_by_name(server: Server, fields: dict[str, Any], status: int, param: str) -> None:
    body = {"model": "m1", "input": "a", "tools": TOOLS, **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/responses", json=body) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (status, param)


async def test_responses_ignores_tools_of_the_server_with_a_warning(server: Server) -> None:
    body = {"model": "m1", "input": "a", "store": False, "tools": [*TOOLS, {"type": "web_search"}]}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/responses", json=body) as response:
        assert response.status == 200
        assert response.headers["Warning"] == '299 repertory "tools other than functions were ignored"'


async def test_responses_names_what_it_ignores(server: Server) -> None:
    item = {"type": "message", "role": "user", "content": "a", "mood": "good", "id": "x"}
    body = {"model": "m1", "input": [item], "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/responses", json=body) as response:
        assert response.status == 200
        warning = response.headers["Warning"]
    assert "unknown fields were ignored: input.0.mood" in warning
    assert "include was ignored: there is nothing to add to the output" in warning
    assert "text.verbosity was ignored" in warning
