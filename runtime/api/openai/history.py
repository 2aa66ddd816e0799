"""Turns a request's messages into the form that chat templates read: texts joined, tool calls with objects as arguments, ids as required."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from runtime.api.openai.types import ChatTurn, HistoryCall
from runtime.errors import InvalidRequest, NotSupported
from runtime.text.chat import ChatMessage
from runtime.text.output_format import CallIds

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_OTHER_PARTS = (
    "image_url", "input_image", "image", "input_audio", "audio", "audio_url", "video", "video_url", "file", "input_file",
)  # fmt: skip
_NINE = re.compile(r"[A-Za-z0-9]{9}")
_NUMBERED = re.compile(r"functions\..+:\d+")


def chat_messages(turns: Sequence[ChatTurn], call_ids: CallIds) -> list[ChatMessage]:
    """Return one message per turn. The text parts of a turn are joined, one line each.

    Raises InvalidRequest for an unknown role, a message without content or a malformed part, NotSupported for parts other than text.
    """
    calls: dict[str, tuple[str, str]] = {}  # the template's id and the function's name, by the request's id
    messages: list[ChatMessage] = []
    num_calls = 0
    for index, turn in enumerate(turns):
        _check_turn(index, turn)
        extra: dict[str, Any] = {}
        if turn.name is not None:
            extra["name"] = turn.name
        reasoning = turn.reasoning if turn.reasoning_content is None else turn.reasoning_content
        if reasoning is not None:
            extra["reasoning_content"] = reasoning
        if turn.tool_calls:
            for call in turn.tool_calls:
                calls[call.id] = _template_id(call, num_calls, call_ids), call.function.name
                num_calls += 1
            extra["tool_calls"] = [_template_call(call, calls[call.id][0]) for call in turn.tool_calls]
        if turn.tool_call_id is not None:
            known = calls.get(turn.tool_call_id)
            extra["tool_call_id"] = known[0] if known else turn.tool_call_id
            if known:
                extra.setdefault("name", known[1])
        has_none = turn.content is None and bool(turn.tool_calls)
        messages.append(ChatMessage(turn.role, None if has_none else _content(index, turn), extra))
    return messages


def _check_turn(index: int, turn: ChatTurn) -> None:
    where = f"messages[{index}]"
    if turn.role not in _ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(_ROLES)}, got {turn.role!r}", param=f"{where}.role"
        )
    says_more = bool(turn.tool_calls or turn.reasoning_content or turn.reasoning)
    if turn.content is None and not (turn.role == "assistant" and says_more):
        raise InvalidRequest(
            f"{where}.content must be a string or a list of parts; only an assistant's message with tool calls may have none",
            param=f"{where}.content",
        )


def _template_call(call: HistoryCall, call_id: str) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            arguments = call.function.arguments  # as the model wrote them
    return {"id": call_id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _template_id(call: HistoryCall, number: int, call_ids: CallIds) -> str:
    if call_ids is CallIds.NINE and not _NINE.fullmatch(call.id):
        return hashlib.blake2b(call.id.encode()).hexdigest()[:9]
    if call_ids is CallIds.NUMBERED and not _NUMBERED.fullmatch(call.id):
        return f"functions.{call.function.name}:{number}"
    return call.id


def _content(index: int, turn: ChatTurn) -> str:
    if isinstance(turn.content, str):
        return turn.content
    texts: list[str] = []
    for position, part in enumerate(turn.content or ()):
        where = f"messages[{index}].content[{position}]"
        kind = part.get("type", "text")
        if kind in _OTHER_PARTS:
            raise NotSupported(f"{where}: content of type {kind!r} is not supported, only text", param=where)
        if kind not in _TEXT_PARTS:
            raise InvalidRequest(f"{where}.type must be one of {', '.join(_TEXT_PARTS)}, got {kind!r}", param=where)
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}: text is missing or not a string", param=where)
        texts.append(text)
    return "\n".join(texts)
