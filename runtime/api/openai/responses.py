"""OpenAI's response bodies: choices, usage, finish reasons and both forms of log-probabilities."""

import uuid
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from runtime.errors import Unavailable
from runtime.generation.parts import Completed, ToolCall
from runtime.interfaces import ServedModel
from runtime.ipc.messages import TokenLogprobs
from runtime.text.text_model import TextModel
from runtime.types import FinishReason

_Choice = TypeVar("_Choice")
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


class ReasoningTokens(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | msgspec.UnsetType = msgspec.UNSET


def usage(num_prompt: int, num_generated: int, num_cached: int, num_reasoning: int = 0) -> Usage:
    """Return the counts. Those of reasoning are left out if there was none."""
    details = ReasoningTokens(num_reasoning) if num_reasoning else msgspec.UNSET
    return Usage(num_prompt, num_generated, num_prompt + num_generated, CachedTokens(num_cached), details)


def finish_word(model: ServedModel, finish: FinishReason, *, called: bool = False) -> str:
    """Return OpenAI's finish reason; `called`: the sequence has tool calls. Raises Unavailable if the runtime ended the sequence."""
    word = _FINISH.get(finish)
    if called and word == "stop":
        return "tool_calls"
    if word is None:
        raise Unavailable("it was unloaded, or the runtime stopped, before the answer was complete", model=model.name)
    return word


def stop_reason(finish: FinishReason | None, stop: str | int | None) -> str | int | None:
    """Return vLLM's field beside finish_reason: the stop string or stop token id, None for an EOS."""
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
    """Return chat log-probabilities. `bytes` are exact; `token` shows a part of a character as U+FFFD."""
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
    """Return parallel lists. The chosen token is always among the `top_logprobs`. The prompt's first token has no values."""
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
    """Return a token's text, or `bytes:\\xe2…` for a part of a character, so that names stay distinct."""
    data = text.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(data: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(data.decode(errors="replace"), _finite(logprob), list(data))


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str  # JSON


class ToolCallOut(msgspec.Struct, frozen=True):
    id: str
    function: FunctionCall
    type: str = "function"


class ChatMessageOut(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's message. `content` is None if the message has only tool calls or a refusal."""

    role: str = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET  # DeepSeek's name for the same text
    tool_calls: list[ToolCallOut] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessageOut
    finish_reason: str
    logprobs: ChatLogprobs | None
    stop_reason: str | int | None


def chat_choice(
    model: ServedModel, result: Completed, *, with_logprobs: bool, names_function: bool = False
) -> ChatChoice:
    """Return a sequence as a choice. `names_function`: the request names the function; its end is "stop", as OpenAI has it. Raises Unavailable if the runtime ended it."""
    calls = [
        ToolCallOut(tool_call_id(call), FunctionCall(call.name or "", call.arguments)) for call in result.tool_calls
    ]
    reasoning = result.reasoning or msgspec.UNSET
    return ChatChoice(
        index=result.index,
        message=ChatMessageOut(
            content=None if not result.text and (calls or result.refusal) else result.text,
            refusal=result.refusal or None,
            reasoning=reasoning,
            reasoning_content=reasoning,
            tool_calls=calls or msgspec.UNSET,
        ),
        finish_reason=finish_word(model, result.finish, called=bool(calls) and not names_function),
        logprobs=chat_logprobs(model.text, result.tokens, result.logprobs) if with_logprobs else None,
        stop_reason=stop_reason(result.finish, result.stop),
    )


def tool_call_id(call: ToolCall) -> str:
    """Return the call's own id, which some formats have none of, or a new one."""
    return call.call_id if call.call_id is not None else f"call_{uuid.uuid4().hex}"


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str
    logprobs: CompletionLogprobs | None
    stop_reason: str | int | None


class Answer(msgspec.Struct, Generic[_Choice], frozen=True):
    """The response body of both APIs, each with choices of its own."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[_Choice]
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
