"""OpenAI's answers: bodies, usage, finish reasons and both forms of log-probabilities. Only shapes; knows no HTTP."""

from collections.abc import Sequence
from typing import Any

import msgspec

from runtime.errors import Unavailable
from runtime.interfaces import ServedModel
from runtime.ipc.messages import TokenLogprobs
from runtime.text.text_model import TextModel
from runtime.types import FinishReason

LOWEST_LOGPROB = -9999.0  # JSON has no infinity

_FINISH = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.TIME_LIMIT: "length",
}


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


def usage(num_prompt: int, num_generated: int, num_cached: int) -> Usage:
    return Usage(num_prompt, num_generated, num_prompt + num_generated, CachedTokens(num_cached))


def finish_word(model: ServedModel, finish: FinishReason) -> str:
    """OpenAI's word. Raises Unavailable where the sequence was ended from within."""
    word = _FINISH.get(finish)
    if word is None:
        raise Unavailable("it was unloaded, or the runtime stopped, before the answer was complete", model=model.name)
    return word


def stop_reason(finish: FinishReason | None, stop: str | int | None) -> str | int | None:
    """vLLM's field beside finish_reason: the stop string or stop token id; None for an EOS."""
    return stop if finish in (FinishReason.STOP_STRING, FinishReason.STOP_TOKEN) else None


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


def chat_logprobs(text: TextModel, tokens: Sequence[int], entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """`bytes` are exact; `token` shows a part of a character as U+FFFD."""
    content: list[TokenLogprob] = []
    for token, entry in zip(tokens, entries, strict=True):
        data = text.token_bytes(token)
        top = [_top(text.token_bytes(other), value) for other, value in entry.top]
        content.append(TokenLogprob(data.decode(errors="replace"), _finite(entry.logprob), list(data), top))
    return ChatLogprobs(content)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


def completion_logprobs(
    text: TextModel, tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: Sequence[int]
) -> CompletionLogprobs:
    """Parallel lists; the chosen token is always among the `top_logprobs`. The prompt's first token has no values."""
    answer = CompletionLogprobs(list(offsets), [], [], [])
    for token, entry in zip(tokens, entries, strict=True):
        name = token_name(text, token)
        answer.tokens.append(name)
        if entry is None:
            answer.token_logprobs.append(None)
            answer.top_logprobs.append(None)
            continue
        best = {token_name(text, other): _finite(value) for other, value in entry.top}
        best.setdefault(name, _finite(entry.logprob))
        answer.token_logprobs.append(_finite(entry.logprob))
        answer.top_logprobs.append(best)
    return answer


def token_name(text: TextModel, token: int) -> str:
    """A token's text; `bytes:\\xe2…` for a part of a character, so that names stay distinct."""
    data = text.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(data: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(data.decode(errors="replace"), _finite(logprob), list(data))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


class ChatMessageOut(msgspec.Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessageOut
    finish_reason: str
    logprobs: ChatLogprobs | None
    stop_reason: str | int | None


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str
    logprobs: CompletionLogprobs | None
    stop_reason: str | int | None


class Answer(msgspec.Struct, frozen=True):
    """The whole answer of either API."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChoice | CompletionChoice]
    usage: Usage


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: ErrorBody


def encode(value: Any) -> bytes:
    return msgspec.json.encode(value)
