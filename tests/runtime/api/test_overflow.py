"""Requests that exceed the context: the errors match the rules by which LangChain, litellm and Anthropic's clients recognise them."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest

from runtime.interfaces import ServedModel
from tests.support import tokenizers as tiny
from tests.support.openai_server import Server, serve
from tests.support.scripted_engine import ScriptedEngine, served

LONG = "the dog " * 150
HUGE = "the dog " * 20_000


def langchain_sees_overflow(error: openai.APIError) -> bool:
    """The rule of langchain-openai 1.7 for OpenAIContextOverflowError; openai 3 shows only the message in `str`."""
    return "context_length_exceeded" in str(error) or any(
        phrase in error.message for phrase in ("Input tokens exceed the configured limit", "prompt is too long")
    )


def litellm_sees_overflow(error: Exception) -> bool:
    """The phrases of litellm 1.110 for ContextWindowExceededError that an OpenAI-compatible server can send."""
    text = str(error).lower()
    return any(
        phrase in text
        for phrase in (
            "this model's maximum context length is",
            "model's maximum context limit",
            '"code": "context_length_exceeded"',
            "prompt is too long",
        )
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m"), chat_template=tiny.CHATML), "m1")


@pytest.fixture
async def server(model: ServedModel) -> AsyncIterator[Server]:
    async with serve(ScriptedEngine(lambda asked: [5]), model) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "limit"), [(LONG, 1), (HUGE, 1), ("the dog", 1000)])
async def test_overflow_is_recognised_by_openai_clients(server: Server, text: str, limit: int, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": text}]
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as of_chat:
            await client.chat.completions.create(model="m1", messages=messages, max_tokens=limit, stream=stream)
        with pytest.raises(openai.BadRequestError) as of_completion:
            await client.completions.create(model="m1", prompt=text, max_tokens=limit, stream=stream)
    for caught in (of_chat, of_completion):
        assert caught.value.code == "context_length_exceeded"
        assert langchain_sees_overflow(caught.value)
        assert litellm_sees_overflow(caught.value)


async def test_overflow_is_recognised_in_responses_and_messages(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as of_response:
            await client.responses.create(model="m1", input=LONG)
        assert langchain_sees_overflow(of_response.value)
        assert litellm_sees_overflow(of_response.value)
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as messages:
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: .* 200 tokens") as of_message:
            await messages.messages.create(model="m1", max_tokens=1, messages=[{"role": "user", "content": LONG}])
        assert litellm_sees_overflow(of_message.value)


async def test_overflow_is_not_reported_for_other_bad_requests(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="m1", prompt="the dog", max_tokens=1, temperature=-1)
    assert not langchain_sees_overflow(caught.value)
    assert not litellm_sees_overflow(caught.value)
