"""Ollama's API through its official client: chats and completions, whole and streamed, tools, thinking, options and refusals."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import ollama
import pytest

from runtime.api.ollama.as_chat import as_chat, prompt_as_chat
from runtime.api.ollama.show import parameter_size
from runtime.api.ollama.types import Call, ChatRequest, GenerateRequest, Message, ToolCall
from runtime.errors import Overloaded
from runtime.interfaces import ServedModel
from runtime.types import FinishReason
from tests.runtime.api.test_tools import CALLS, HERMES, WEATHER, prompt_of, say
from tests.support import tokenizers as tiny
from tests.support.grammars import GrammarReader
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "hello"}]
TEXT = "The dog sleeps."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = tmp_path_factory.mktemp("m")
    return served(tiny.byte_level(path, chat_template=HERMES), "m1", max_model_len=2000)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> GrammarReader:
    return GrammarReader(tiny.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    async with serve(ScriptedEngine(lambda asked: []), model) as found:
        say(found, TEXT)
        yield found


@pytest.fixture
async def client(server: Server) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(host=server.url) as found:
        yield found


@pytest.mark.parametrize("name", ["m1", "m1:latest"])
async def test_chat_answers(client: ollama.AsyncClient, server: Server, name: str) -> None:
    answer = await client.chat(model=name, messages=HELLO)
    assert (answer.message.role, answer.message.content) == ("assistant", TEXT)
    assert (answer.model, answer.done, answer.done_reason) == (name, True, "stop")
    assert answer.prompt_eval_count == len(server.engine.asked[0].request.prompt)
    assert answer.eval_count == len(server.script(TEXT)) + 1
    assert answer.total_duration == (answer.prompt_eval_duration or 0) + (answer.eval_duration or 0)


async def test_chat_streams_lines(client: ollama.AsyncClient, server: Server) -> None:
    lines = [line async for line in await client.chat(model="m1", messages=HELLO, stream=True)]
    assert "".join(line.message.content or "" for line in lines) == TEXT
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert len(lines) > 3
    assert (lines[-1].done_reason, lines[-1].eval_count) == ("stop", len(server.script(TEXT)) + 1)
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.url}/api/chat", json={"model": "m1", "messages": HELLO}) as raw,
    ):
        assert raw.headers["Content-Type"] == "application/x-ndjson"  # a stream is the default


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_reads_tools_and_thinking(client: ollama.AsyncClient, server: Server, stream: bool) -> None:
    say(server, CALLS.removeprefix("<think>\n"))  # the template has opened it
    asked: Any = {"model": "m1", "messages": HELLO, "tools": [WEATHER], "think": True}
    if stream:
        lines = [line async for line in await client.chat(**asked, stream=True)]
    else:
        lines = [await client.chat(**asked)]
    calls = [call.function for line in lines for call in line.message.tool_calls or ()]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", {"city": "Köln"}),
        ("weather", {"city": "Paris"}),
    ]
    assert "".join(line.message.thinking or "" for line in lines).strip() == "Hm."
    assert "".join(line.message.content or "" for line in lines).strip() == "I look."
    assert (lines[-1].done, lines[-1].done_reason) == (True, "stop")
    assert prompt_of(server).endswith("<think>\n")


async def test_chat_without_thinking_leaves_it_out(client: ollama.AsyncClient, server: Server) -> None:
    say(server, CALLS)
    answer = await client.chat(model="m1", messages=HELLO, tools=[WEATHER], think=False)
    assert answer.message.thinking is None
    assert prompt_of(server).endswith("</think>\n\n")


def test_as_chat_pairs_results_with_calls() -> None:
    def call(name: str) -> ToolCall:
        return ToolCall(Call(name, {"a": 1}))

    messages = [
        Message(role="assistant", tool_calls=[call("f"), call("g")]),
        Message(role="tool", content="of g", tool_name="g"),
        Message(role="tool", content="of f"),
        Message(role="tool", content="of nothing"),
    ]
    turns = as_chat(ChatRequest(messages=messages)).messages
    first, second = list(turns[0].tool_calls or ())
    assert [turn.tool_call_id for turn in turns[1:]] == [second.id, first.id, None]
    assert (first.function.name, first.function.arguments, turns[0].content) == ("f", {"a": 1}, None)


def test_as_chat_maps_options() -> None:
    options = {
        "num_predict": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repeat_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "seed": 4, "stop": ["a"], "num_ctx": 4096, "mirostat": 0, "tfs_z": 1,
    }  # fmt: skip
    chat = as_chat(ChatRequest(messages=[Message(role="user")], options=options))
    assert (chat.max_tokens, chat.temperature, chat.top_k, chat.top_p, chat.min_p) == (7, 0.5, 9, 0.9, 0.1)
    assert (chat.typical_p, chat.repetition_penalty, chat.presence_penalty) == (0.8, 1.1, 0.2)
    assert (chat.frequency_penalty, chat.seed, chat.stop) == (0.3, 4, ["a"])
    assert as_chat(ChatRequest(options={"num_predict": -1})).max_tokens is None
    assert prompt_as_chat(GenerateRequest(prompt="a", system="b", think="low")).reasoning_effort == "low"


async def test_generate_answers(client: ollama.AsyncClient, server: Server) -> None:
    answer = await client.generate(model="m1", prompt="hello", system="Be brief.")
    assert (answer.response, answer.done_reason) == (TEXT, "stop")
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt_of(server)
    lines = [line async for line in await client.generate(model="m1", prompt="hello", stream=True)]
    assert "".join(line.response or "" for line in lines) == TEXT
    answer = await client.generate(model="m1", prompt="hello", raw=True, options={"num_predict": 2})
    assert prompt_of(server) == "hello"
    assert (answer.done_reason, answer.eval_count) == ("length", 2)


async def test_generate_cuts_its_limit_to_the_context(client: ollama.AsyncClient, server: Server) -> None:
    for raw in (False, True):
        await client.generate(model="m1", prompt="hello", raw=raw, options={"num_predict": 10**6})
        request = server.engine.asked[-1].request
        assert request.stop.max_tokens == 2000 - len(request.prompt)


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_carry_log_probabilities(client: ollama.AsyncClient, server: Server, stream: bool) -> None:
    asked: Any = {"model": "m1", "prompt": "hello", "logprobs": True, "top_logprobs": 2}
    lines = (
        [line async for line in await client.generate(**asked, stream=True)]
        if stream
        else [await client.generate(**asked)]
    )
    found = [entry for line in lines for entry in line.logprobs or ()]
    assert len(found) == len(server.script(TEXT)) + 1
    assert {(entry.logprob, len(entry.top_logprobs or ())) for entry in found} == {(-1.5, 2)}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("form", "good", "bad"), [("json", '{"b": 1}', "[]"), (SCHEMA, '{"a": 1}', "{}")])
async def test_format_becomes_a_grammar(
    client: ollama.AsyncClient, server: Server, reader: GrammarReader, raw: bool, form: Any, good: str, bad: str
) -> None:
    await client.generate(model="m1", prompt="hello", format=form, raw=raw)
    if not raw:
        await client.chat(model="m1", messages=HELLO, format=form)
    for asked in server.engine.asked:
        assert asked.request.grammar is not None
        assert (reader.accepts(asked.request.grammar, good), reader.accepts(asked.request.grammar, bad)) == (
            True,
            False,
        )


async def test_ollama_loads_a_model_by_an_empty_request(client: ollama.AsyncClient, server: Server) -> None:
    assert (await client.chat(model="m1", messages=[])).done_reason == "load"
    answer = await client.generate(model="m1", prompt="")
    assert (answer.done_reason, answer.response) == ("load", "")
    assert server.engine.asked == []


async def test_show_describes_the_model(client: ollama.AsyncClient) -> None:
    answer = await client.show("m1")
    assert answer.capabilities == ["completion", "tools", "thinking"]
    assert answer.modelinfo is not None
    assert answer.modelinfo["TinyForCausalLM.context_length"] == 2000
    assert answer.details is not None
    assert (answer.details.family, answer.details.parameter_size) == ("TinyForCausalLM", "10")


@pytest.mark.parametrize(("count", "text"), [(10, "10"), (134_515_008, "134.5M"), (8_030_000_000, "8.0B")])
def test_parameter_size_is_rounded(count: int, text: str) -> None:
    assert parameter_size(count) == text


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "nobody"}, 404, "loaded: m1"),
        ({"options": {"temperature": -1}}, 400, "temperature"),
        ({"options": {"top_k": "many"}}, 400, "wrong type"),
        ({"options": {"mirostat": 2}}, 501, "mirostat"),
        ({"options": {"tfs_z": 0.5}}, 501, "tfs_z"),
        ({"format": 7}, 400, "format"),
        ({"format": {"type": 7}}, 400, "format.schema"),
        ({"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, 501, "messages[0].images"),
        ({"messages": [{"role": "user", "content": "the dog " * 5000}]}, 400, "maximum context length is 2000"),
        ({"messages": 7}, 400, "messages"),
        ({"think": "a lot"}, 400, "reasoning_effort"),
    ],
)
async def test_chat_refuses_with_a_text(server: Server, fields: dict[str, Any], status: int, words: str) -> None:
    body = {"model": "m1", "messages": HELLO, **fields}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/api/chat", json=body) as answer:
        found = await answer.json()
    assert (answer.status, list(found)) == (status, ["error"])
    assert words in found["error"]


@pytest.mark.parametrize("field", [{"suffix": "a"}, {"template": "a"}, {"context": [1]}, {"images": ["aGk="]}])
async def test_generate_refuses_what_it_lacks(client: ollama.AsyncClient, field: dict[str, Any]) -> None:
    with pytest.raises(ollama.ResponseError, match="is not supported") as caught:
        await client.generate(model="m1", prompt="a", **field)
    assert caught.value.status_code == 501


async def test_generate_refuses_system_beside_raw(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError, match="raw mode does not support system") as caught:
        await client.generate(model="m1", prompt="a", raw=True, system="b")
    assert caught.value.status_code == 400


async def test_generate_notes_a_system_that_a_model_has_no_place_for(tmp_path: Path) -> None:
    base = served(tiny.byte_level(tmp_path / "base", chat_template=None), "base", max_model_len=2000)
    async with serve(ScriptedEngine(lambda asked: []), base) as server, aiohttp.ClientSession() as http:
        say(server, TEXT)
        body = {"model": "base", "prompt": "a", "stream": False}
        async with http.post(f"{server.url}/api/generate", json=body) as answer:
            assert (answer.status, "Warning" in answer.headers) == (200, False)
        async with http.post(f"{server.url}/api/generate", json={**body, "system": "b"}) as answer:
            assert "system has no effect" in answer.headers["Warning"]


async def test_unknown_options_are_noted(server: Server) -> None:
    body = {"model": "m1", "messages": HELLO, "stream": False, "options": {"num_ctx": 5}}
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{server.url}/api/chat", json=body) as answer:
            assert "Warning" not in answer.headers
        asked = {**body, "options": {"warmth": 5, "num_ctx": 10**6}, "messages": [{**HELLO[0], "mood": "good"}]}
        async with http.post(f"{server.url}/api/chat", json=asked) as answer:
            warning = answer.headers["Warning"]
    assert "unknown fields were ignored: messages.0.mood, options.warmth" in warning
    assert "num_ctx has no effect: the context is" in warning


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("5m", 200), ("1h30m", 200), ("-1s", 200), (-1, 200), ("300", 200), (1.5, 200), (None, 200),
        ("soon", 400), ("5 m", 400), ("", 400), (True, 400), ({}, 400),
    ],
)  # fmt: skip
async def test_keep_alive_is_a_duration(server: Server, given: Any, status: int) -> None:
    body = {"model": "m1", "messages": HELLO, "stream": False, "keep_alive": given}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/api/chat", json=body) as answer:
        assert answer.status == status
        assert ("keep_alive must be" in await answer.text()) == (status == 400)


async def test_embed_answers_with_vectors_of_length_1(tmp_path: Path) -> None:
    path = tiny.byte_level(tmp_path / "m")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    model = served(path, "m2", max_model_len=40)
    async with serve(ScriptedEngine(lambda asked: []), model) as found:
        client = ollama.AsyncClient(host=found.url)
        answer = await client.embed(model="m2:latest", input=["the dog", "a"], dimensions=3)
        one = await client.embed(model="m2", input="the dog", dimensions=3)
        old = await client.embeddings(model="m2", prompt="the dog")
        with pytest.raises(ollama.ResponseError, match="the prompt is too long") as caught:
            await client.embed(model="m2", input="the dog " * 50)
    assert [len(vector) for vector in answer.embeddings] == [3, 3]
    assert answer.embeddings[0] == one.embeddings[0] != answer.embeddings[1]
    assert sum(value * value for value in one.embeddings[0]) == pytest.approx(1)
    scale = one.embeddings[0][0] / old.embedding[0]
    assert [value * scale for value in old.embedding[:3]] == pytest.approx(one.embeddings[0])
    assert scale != pytest.approx(1)
    assert answer.prompt_eval_count == len(model.text.encode("the dog")) + 1
    assert caught.value.status_code == 400


async def test_embed_refuses_a_model_that_makes_none(client: ollama.AsyncClient) -> None:
    with pytest.raises(ollama.ResponseError, match="it is not an embedding model") as caught:
        await client.embed(model="m1", input="a")
    assert caught.value.status_code == 400


async def test_errors_of_the_engine(client: ollama.AsyncClient, server: Server) -> None:
    server.engine.raises = Overloaded("its queue is full", model="m1", retry_after_s=2)
    with pytest.raises(ollama.ResponseError, match="queue is full") as caught:
        await client.chat(model="m1", messages=HELLO)
    assert caught.value.status_code == 429
    server.engine.raises, server.engine.fail_after = None, 2
    stream = await client.chat(model="m1", messages=HELLO, stream=True)
    with pytest.raises(ollama.ResponseError, match="the engine died"):
        [line async for line in stream]
    server.engine.fail_after, server.engine.finish_with = None, FinishReason.ABORTED
    server.engine.script = lambda asked: [5]
    with pytest.raises(ollama.ResponseError, match="unloaded") as caught:
        await client.chat(model="m1", messages=HELLO)
    assert caught.value.status_code == 503


async def test_ollama_line_is_json_with_a_time(server: Server) -> None:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{server.url}/api/generate", json={"model": "m1", "prompt": "a"}) as answer,
    ):
        first = json.loads((await answer.text()).splitlines()[0])
    assert first["created_at"].endswith("Z")
    assert set(first) == {"model", "created_at", "done", "response"}
