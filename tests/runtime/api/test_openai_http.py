"""OpenAI's routes on the wire: what clients other than the official one send, and how bad input is answered."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from common.model_key import DefaultSampling, ModelSettings
from runtime.config.schema import RuntimeConfig
from runtime.interfaces import ServedModel
from tests.support.openai_server import Server, chat, post, serve
from tests.support.scripted_engine import ScriptedEngine, served


async def test_event_chunks_are_one_line_however_lines_are_split(http: aiohttp.ClientSession, server: Server) -> None:
    text = 'a\u2028b\u2029c\x85d\r\n\x0b\x0c\x1ee"\\'
    server.engine.script = lambda asked: [*server.script(text), 0]
    async with http.post(server.url + "/v1/chat/completions", json=chat(stream=True)) as response:
        raw = await response.text()
    assert raw.splitlines() == raw.split("\n")[:-1]
    lines = [msgspec.json.decode(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["delta"]["content"] for line in lines) == text


async def test_chat_accepts_benchmark_clients_bodies(http: aiohttp.ClientSession, server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    body = chat(
        messages=parts, max_completion_tokens=5, ignore_eos=True, stream=False, logprobs=None, repetition_penalty=1.0
    )
    status, _, headers = await post(http, server, "/v1/chat/completions", body, **{"X-Request-Id": "bench-1"})
    assert status == 200
    assert headers["X-Request-Id"] == "bench-1"
    assert "user\na\nb<|im_end|>" in server.model.text.decode(
        server.engine.asked[0].request.prompt, skip_special_tokens=False
    )
    assert server.engine.asked[0].request.stop.ignore_eos


async def test_chat_continues_an_assistant_message_at_the_end(http: aiohttp.ClientSession, server: Server) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    await post(http, server, "/v1/chat/completions", chat(messages=turns))
    await post(http, server, "/v1/chat/completions", chat(messages=turns, add_generation_prompt=True))
    texts = [server.model.text.decode(asked.request.prompt, skip_special_tokens=False) for asked in server.engine.asked]
    assert texts[0].endswith("<|im_start|>assistant\nWell, ")
    assert texts[1].endswith("Well, <|im_end|>\n<|im_start|>assistant\n")


async def test_render_chat_of_many_turns_runs_in_a_thread(
    http: aiohttp.ClientSession, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes microseconds a turn, and a body has room for hundreds of thousands."""
    threads: list[bool] = []
    render = type(server.model.text).render_chat

    def watched(*args: Any) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        return render(*args)

    monkeypatch.setattr(type(server.model.text), "render_chat", watched)
    turn = {"role": "user", "content": ""}
    assert (await post(http, server, "/v1/chat/completions", chat(messages=[turn])))[0] == 200
    status, answer, _ = await post(http, server, "/v1/chat/completions", chat(messages=[turn] * 1000))
    assert (status, "maximum context length is 200" in answer["error"]["message"]) == (400, True)
    assert threads == [True, False]


async def test_parse_names_unknown_fields_in_a_header(http: aiohttp.ClientSession, server: Server) -> None:
    status, _, headers = await post(
        http, server, "/v1/chat/completions", chat(top_a=1, **{"x\r\ny": 2, "reasoning_effort": None})
    )
    assert status == 200
    assert headers["Warning"] == '299 repertory "unknown fields were ignored: top_a, x??y"'


async def test_parse_names_unknown_fields_of_messages(http: aiohttp.ClientSession, server: Server) -> None:
    turns = [{"role": "user", "content": "a", "cache_control": {"type": "ephemeral"}, "refusal": None}]
    status, _, headers = await post(http, server, "/v1/chat/completions", chat(messages=turns))
    assert status == 200
    assert headers["Warning"] == '299 repertory "unknown fields were ignored: messages.0.cache_control"'


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "structural_tag"}},
        {"best_of": 2},
        {"adapter_parameters": {"ids": ["a", "b"], "weights": [0.5, 0.5]}},
        {"store": True},
        {"web_search_options": {}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
    ],
)
async def test_parse_refuses_unsupported_features(
    http: aiohttp.ClientSession, server: Server, fields: dict[str, Any]
) -> None:
    status, answer, headers = await post(http, server, "/v1/chat/completions", chat(**fields))
    assert status == 501
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"].split("[")[0] in fields
    assert headers["x-should-retry"] == "false"  # else the official clients ask three times
    assert "not supported" in answer["error"]["message"]
    assert not server.engine.asked


async def test_parse_accepts_empty_forms_of_unsupported_features(http: aiohttp.ClientSession, server: Server) -> None:
    body = chat(tools=None, tool_choice="none", response_format={"type": "text"}, functions=None, best_of=1)
    assert (await post(http, server, "/v1/chat/completions", body))[0] == 200
    assert (await post(http, server, "/v1/completions", {"model": "m1", "prompt": "a", "suffix": "b"}))[0] == 501


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "-1"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"n": 0}, "n", "0"),
        ({"n": 1000}, "n", "1000"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": 500}, "max_tokens", "200"),
        ({"max_completion_tokens": 500}, "max_completion_tokens", "200"),
        ({"max_tokens": "many"}, "max_tokens", "int"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages", "200"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "999999"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids", "1024"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
        ({"allowed_token_ids": [5, 999999]}, "allowed_token_ids", "999999"),
        ({"allowed_token_ids": [0, 7], "stop_token_ids": [7], "min_tokens": 1}, "allowed_token_ids", "min_tokens"),
        ({"stop": ["a"] * 65}, "stop", "64"),
        ({"stop": [""]}, "stop", "1 to"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "9"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "template"),
    ],
)
async def test_chat_refuses_bad_parameters(
    http: aiohttp.ClientSession, server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    status, answer, _ = await post(http, server, "/v1/chat/completions", chat(**fields))
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]
    assert not server.engine.asked


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"model":"m1"}', 400),
        (b"[" * 50_000, 400),
        (b" " * 300_000, 413),
    ],
)
async def test_parse_refuses_bad_bodies(http: aiohttp.ClientSession, server: Server, raw: bytes, status: int) -> None:
    found, answer, _ = await post(http, server, "/v1/chat/completions", raw)
    assert found == status
    assert answer["error"]["message"]


async def test_http_app_survives_half_a_request(http: aiohttp.ClientSession, server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"model":')
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    status, answer, _ = await post(
        http, server, "/v1/completions", b"not gzip", **{"Content-Encoding": "gzip", "Connection": "close"}
    )
    assert status == 400, answer
    assert (await post(http, server, "/v1/completions", {"model": "m1", "prompt": "a"}))[0] == 200


async def test_http_app_refuses_unknown_routes(http: aiohttp.ClientSession, server: Server) -> None:
    assert (await post(http, server, "/v1/nothing", {}))[0] == 404
    status, answer, _ = await post(http, server, "/v1/rerank", {})
    assert status == 501
    assert "not supported" in answer["error"]["message"]
    async with http.get(server.url + "/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert "error" in await response.json()


async def test_find_model_prefers_the_header(http: aiohttp.ClientSession, server: Server) -> None:
    status, answer, _ = await post(http, server, "/v1/chat/completions", chat(model="alias"), **{"mm-model-id": "m1"})
    assert (status, answer["model"]) == (200, "alias")
    assert (await post(http, server, "/v1/chat/completions", chat(), **{"mm-model-id": "gone"}))[0] == 404
    assert (await post(http, server, "/v1/chat/completions", chat(model="")))[0] == 400


async def test_chat_defaults_of_the_registration_come_first(http: aiohttp.ClientSession, model_dir: Path) -> None:
    settings = ModelSettings(
        sampling=DefaultSampling(temperature=0.2, top_k=5, max_tokens=7), display_name="shown", max_concurrency=1
    )
    model = served(model_dir, "m2", settings=settings)
    async with serve(ScriptedEngine(lambda asked: [5] * 50), model) as server:
        status, answer, _ = await post(http, server, "/v1/chat/completions", chat(model="shown", top_k=9))
        asked = server.engine.asked[0]
        assert (status, answer["model"]) == (200, "shown")
        assert (asked.request.sampling.temperature, asked.request.sampling.top_k, asked.request.stop.max_tokens) == (
            0.2,
            9,
            7,
        )
        status, answer, headers = await post(http, server, "/v1/chat/completions", chat(model="m2", n=2))
        assert status == 429
        assert "limit is 1" in answer["error"]["message"]
        assert headers["Retry-After"] == "1"


async def test_tokenize_and_detokenize(http: aiohttp.ClientSession, server: Server) -> None:
    _, answer, _ = await post(
        http, server, "/tokenize", {"model": "m1", "prompt": "The dog", "return_token_strs": True}
    )
    assert answer["tokens"] == server.script("The dog")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 200
    _, back, _ = await post(http, server, "/detokenize", {"model": "m1", "tokens": answer["tokens"]})
    assert back["prompt"] == "The dog"
    _, chatted, _ = await post(http, server, "/tokenize", chat())
    assert chatted["tokens"][0] == 1
    assert (await post(http, server, "/tokenize", {"model": "m1"}))[0] == 400


async def test_health_and_metrics(http: aiohttp.ClientSession, server: Server) -> None:
    async with http.get(server.url + "/health") as response:
        assert response.status == 200
    await post(http, server, "/v1/chat/completions", chat())
    for method in ("GET", "HEAD"):
        async with http.request(method, server.url + "/metrics") as response:
            assert response.status == 200
            text = await response.text()
            if method == "GET":
                assert 'vllm:request_success_total{finished_reason="stop",model_name="m1"} 1.0' in text
                assert 'vllm:time_to_first_token_seconds_count{model_name="m1"} 1.0' in text
    server.metrics.forget("m1")
    async with http.get(server.url + "/metrics") as response:
        assert 'model_name="m1"' not in await response.text()


async def test_web_guard_refuses_foreign_pages(model: ServedModel) -> None:
    """A page in a browser on the machine of a runtime that listens on loopback must not be able to use it."""
    config = RuntimeConfig(http_listen="127.0.0.1:0", cors_origins=("https://chat.example",))
    async with (
        serve(ScriptedEngine(lambda asked: []), model, config=config) as found,
        aiohttp.ClientSession(found.url) as session,
    ):
        for headers, status in (
            ({"Host": "evil.example"}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "https://chat.example"}, 404),
            ({}, 404),
        ):
            async with session.post("/v1/completions", json={"model": "no", "prompt": "x"}, headers=headers) as answer:
                assert answer.status == status, headers
                is_configured = headers.get("Origin") == "https://chat.example"
                assert ("Access-Control-Allow-Origin" in answer.headers) == is_configured
