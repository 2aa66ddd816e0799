"""OpenAI's routes through the official client, sync and async, whole and streamed."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from runtime.interfaces import ServedModel
from runtime.types import FinishReason
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served
from tests.support.waiting import until

TEXT = "The quick brown fox — 東京 🤖 END. The dog"
HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m")), "org/m1", max_model_len=400)


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve(ScriptedEngine(lambda asked: [*tokens, 0]), model) as found:
        yield found


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


async def test_chat(client: openai.AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(model="org/m1", messages=HELLO, temperature=0)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "org/m1"
    asked = server.engine.asked[0]
    assert (
        server.model.text.decode(asked.request.prompt, skip_special_tokens=False)
        == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert asked.request.stop.max_tokens == 400 - len(asked.request.prompt)
    assert asked.request.sampling.greedy
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(asked.request.prompt)
    assert answer.usage.completion_tokens == len(server.script(TEXT)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


async def test_chat_streamed_equals_whole(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="org/m1", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert all("�" not in (chunk.choices[0].delta.content or "") for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_openai_client_streams_synchronously(server: Server) -> None:
    def run() -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="org/m1", prompt="The", stream=True, max_tokens=100)
            return "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(run) == TEXT


async def test_chat_stream_continuous_usage_counts_up(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="org/m1",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    )
    counts = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] > counts[0]


@pytest.mark.parametrize("stop", ["END", ["nothing", "END"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_chat_stop_strings_cut_the_text_and_end_the_row(
    client: openai.AsyncOpenAI, server: Server, stop: str | list[str], stream: bool
) -> None:
    if stream:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="org/m1", messages=HELLO, stop=stop, stream=True
            )
        ]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        answer = await client.chat.completions.create(model="org/m1", messages=HELLO, stop=stop)
        text, finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert text == TEXT[: TEXT.index("END")]
    assert finish == "stop"
    if not stream:
        assert answer.usage is not None
        assert len(server.script(TEXT[: TEXT.index("END") + 3])) == answer.usage.completion_tokens
    assert server.engine.asked[0].closed, "the row was left before its end"


@pytest.mark.parametrize("skip_special_tokens", [True, False])
async def test_chat_stop_string_may_be_a_special_token(
    client: openai.AsyncOpenAI, server: Server, skip_special_tokens: bool
) -> None:
    server.engine.script = lambda asked: [*server.script("The dog"), 2, *server.script(" more")]
    answer = await client.chat.completions.create(
        model="org/m1", messages=HELLO, stop=["<|im_end|>"], extra_body={"skip_special_tokens": skip_special_tokens}
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("The dog", "stop")
    assert answer.choices[0].model_extra == {"stop_reason": "<|im_end|>"}


async def test_completions_include_stop_and_max_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="org/m1", messages=HELLO, stop="END", extra_body={"include_stop_str_in_output": True}
    )
    assert (answer.choices[0].message.content or "").endswith("END")
    short = await client.chat.completions.create(model="org/m1", messages=HELLO, max_tokens=50, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3


async def test_chat_n_sequences_have_their_own_seeds(client: openai.AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(model="org/m1", messages=HELLO, n=3, seed=7, temperature=0.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(asked.request.sampling.seed for asked in server.engine.asked) == [7, 8, 9]
    stream = await client.chat.completions.create(model="org/m1", messages=HELLO, n=2, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [TEXT, TEXT]
    drawn = [asked.request.sampling.seed for asked in server.engine.asked[3:]]
    assert drawn[0] != drawn[1]


async def test_chat_logprobs(client: openai.AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(model="org/m1", messages=HELLO, logprobs=True, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert b"".join(bytes(item.bytes or []) for item in found.content[:-1]) == TEXT.encode()
    assert all(item.logprob == -1.5 and len(item.top_logprobs) == 2 for item in found.content)
    stream = await client.chat.completions.create(model="org/m1", messages=HELLO, logprobs=True, stream=True)
    streamed = [
        item async for chunk in stream if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content or ()
    ]
    assert [item.token for item in streamed] == [item.token for item in found.content]
    assert streamed[0].top_logprobs == []


async def test_completions_parameters_reach_the_engine(client: openai.AsyncOpenAI, server: Server) -> None:
    await client.completions.create(
        model="org/m1",
        prompt="The",
        temperature=0.7,
        top_p=0.9,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": -100},
        extra_body={
            "top_k": 4, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [9], "ignore_eos": True,
            "priority": 3, "allowed_token_ids": [5, 7, 5],
        },
    )  # fmt: skip
    asked = server.engine.asked[0]
    sampling = asked.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.typical_p) == (
        0.7,
        0.9,
        4,
        0.1,
        0.8,
    )
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.2, 0.5, -0.5)
    assert sampling.logit_bias == ((5, -100.0),)
    assert sampling.allowed_token_ids == (5, 7)
    assert (
        asked.request.stop.min_tokens,
        asked.request.stop.stop_token_ids,
        asked.request.stop.ignore_eos,
        asked.request.stop.max_tokens,
    ) == (
        2,
        (9,),
        True,
        16,
    )
    assert asked.request.priority == 3


async def test_chat_stream_disconnect_frees_the_row(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.step_s = 0.01
    server.engine.script = lambda asked: [5] * 100_000
    stream = await client.completions.create(model="org/m1", prompt="The", stream=True, max_tokens=390)
    async for _ in stream:
        break
    await stream.close()
    asked = server.engine.asked[0]
    await until(lambda: asked.closed)
    assert asked.sent < 390


async def test_chat_disconnect_before_the_response_frees_the_row(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.step_s = 0.05
    server.engine.script = lambda asked: [5] * 100_000
    with pytest.raises(openai.APITimeoutError):
        await client.completions.create(model="org/m1", prompt="The", max_tokens=390, timeout=0.3)
    await until(lambda: server.engine.asked[0].closed)


async def test_chat_stream_sends_keep_alives_while_it_waits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.api.openai.stream.KEEP_ALIVE_S", 0.02)
    server.engine.step_s = 0.1
    server.engine.script = lambda asked: [5, 6, 7]
    body = {"model": "org/m1", "prompt": "The", "stream": True}
    async with aiohttp.ClientSession() as http, http.post(f"{server.url}/v1/completions", json=body) as response:
        assert response.status == 200
        blocks = (await response.text()).split("\n\n")
    assert blocks[0] == ": keep-alive"
    assert blocks[-2:] == ["data: [DONE]", ""]
    events = [block for block in blocks[:-2] if block.startswith("data: {")]
    assert len(events) >= 2
    assert all(block == ": keep-alive" for block in blocks[:-2] if block not in events)


async def test_chat_stream_error_before_the_first_token_has_a_status(
    client: openai.AsyncOpenAI, server: Server
) -> None:
    from runtime.errors import Overloaded

    server.engine.raises = Overloaded("model org/m1: 4096 sequences wait; its limit is 4096", retry_after_s=1.5)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="org/m1", messages=HELLO, stream=True)
    assert caught.value.response.headers["retry-after"] == "2"
    assert caught.value.response.headers["retry-after-ms"] == "1500"
    assert "4096" in caught.value.message


async def test_chat_stream_error_is_the_last_event(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.fail_after = 4
    got: list[str] = []

    async def read() -> None:
        async for chunk in await client.chat.completions.create(model="org/m1", messages=HELLO, stream=True):
            got.append(chunk.choices[0].delta.content or "")  # noqa: PERF401  (what came before the error is looked at)

    with pytest.raises(openai.APIError, match="the engine died"):
        await read()
    assert got[0] == ""
    assert TEXT.startswith("".join(got))


async def test_chat_of_an_unloaded_model_is_an_error(client: openai.AsyncOpenAI, server: Server) -> None:
    server.engine.finish_with = FinishReason.ABORTED
    server.engine.script = lambda asked: [5, 6]
    with pytest.raises(openai.InternalServerError, match="unloaded") as caught:
        await client.completions.create(model="org/m1", prompt="The")
    assert caught.value.status_code == 503


async def test_find_model_names_the_loaded_ones(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="org/m1") as caught:
        await client.chat.completions.create(model="nobody", messages=HELLO)
    assert caught.value.code == "model_not_found"


async def test_models_lists_loaded_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["org/m1"]
    assert (await client.models.retrieve("org/m1")).id == "org/m1"
