"""Response bodies of the Messages API: a whole message, its usage and stop reason, and errors."""

import uuid
from typing import Any

import msgspec

from common.error_codes import ANTHROPIC_TYPES
from runtime.api.openai.responses import encode, finish_word
from runtime.errors import ModelNotFound, RepertoryError
from runtime.generation.parts import Completed, Finish
from runtime.interfaces import ServedModel
from runtime.types import FinishReason


class MessageUsage(msgspec.Struct, frozen=True):
    """`input_tokens` are those that were not in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


def message_usage(num_prompt: int, num_generated: int, num_cached: int) -> MessageUsage:
    return MessageUsage(num_prompt - num_cached, num_generated, num_cached)


class TextBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class Message(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[Block]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage
    role: str = "assistant"


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


def stop_reason(model: ServedModel, finish: Finish, *, called: bool) -> tuple[str, str | None]:
    """Return the stop reason and the stop sequence. Raises Unavailable if the runtime ended the sequence."""
    word = finish_word(model, finish.reason, called=called)
    if word == "tool_calls":
        return "tool_use", None
    if word == "length":
        return "max_tokens", None
    if finish.reason is FinishReason.STOP_STRING:
        return "stop_sequence", str(finish.stop)
    return "end_turn", None


def message(model: ServedModel, shown_name: str, num_prompt: int, result: Completed) -> Message:
    """Return a sequence as a message. Raises Unavailable if the runtime ended it."""
    reason, sequence = stop_reason(model, Finish(result.finish, result.stop), called=bool(result.tool_calls))
    content: list[Block] = [ThinkingBlock(result.reasoning)] if result.reasoning else []
    if result.text:
        content.append(TextBlock(result.text))
    for call in result.tool_calls:
        arguments = msgspec.json.decode(call.arguments, type=dict[str, Any])
        content.append(ToolUseBlock(call.call_id or new_call_id(), call.name or "", arguments))
    counted = message_usage(num_prompt, len(result.tokens), result.cached_tokens)
    return Message(new_message_id(), shown_name, content, reason, sequence, counted)


def new_message_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def new_call_id() -> str:
    return f"toolu_{uuid.uuid4().hex}"


class Problem(msgspec.Struct, frozen=True):
    type: str
    message: str
    code: str | msgspec.UnsetType = msgspec.UNSET


class ErrorAnswer(msgspec.Struct, frozen=True, tag_field="type", tag="error"):
    error: Problem


def error_body(error: RepertoryError) -> bytes:
    """Return the error. A model that is not loaded has a code too, by which the mesh finds another copy."""
    code = "model_not_found" if isinstance(error, ModelNotFound) else msgspec.UNSET
    return encode(ErrorAnswer(Problem(ANTHROPIC_TYPES.get(error.http_status, "api_error"), error.message, code)))
