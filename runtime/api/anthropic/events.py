"""The server-sent events of a streamed message, made from deltas."""

from typing import Any

from runtime.api.anthropic.responses import (
    Message,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    error_body,
    message_usage,
    new_call_id,
    new_message_id,
    stop_reason,
)
from runtime.api.openai.responses import encode
from runtime.errors import RepertoryError
from runtime.generation.parts import Delta, Finish, Part, Reasoning, Text, ToolCall
from runtime.interfaces import ServedModel


class MessageEvents:
    """Makes the events of one message. Its blocks come one after another, and each has an index."""

    def __init__(self, model: ServedModel, shown_name: str, num_prompt: int) -> None:
        self.num_events = 0
        self._model = model
        self._shown_name = shown_name
        self._num_prompt = num_prompt
        self._num_blocks = 0
        self._open: tuple[type[Part], int] | None = None  # the open block's kind, and the number of its call
        self._called = False

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's events. Raises Unavailable for a sequence that the runtime ended."""
        events = [] if self.num_events else [self._start(delta)]
        for part in delta.parts:
            if isinstance(part, Finish):
                reason, sequence = stop_reason(self._model, part, called=self._called)
                events += self._close()
                ending = {"stop_reason": reason, "stop_sequence": sequence}
                usage = {"output_tokens": delta.num_generated}
                events.append(_event("message_delta", {"delta": ending, "usage": usage}))
            else:
                events += self._content(part)
        self.num_events += len(events)
        return b"".join(events)

    def end(self) -> bytes:
        return _event("message_stop", {})

    def error(self, error: RepertoryError) -> bytes:
        return b"event: error\ndata: " + error_body(error) + b"\n\n"

    def _start(self, delta: Delta) -> bytes:
        usage = message_usage(self._num_prompt, 0, delta.cached_tokens or 0)
        message = Message(new_message_id(), self._shown_name, [], None, None, usage)
        return _event("message_start", {"message": message})

    def _content(self, part: Part) -> list[bytes]:
        kind = (type(part), part.index if isinstance(part, ToolCall) else 0)
        events: list[bytes] = []
        if self._open != kind:
            events = self._close()
            self._open = kind
            events.append(_event("content_block_start", {"index": self._num_blocks, "content_block": _empty(part)}))
            self._called = self._called or isinstance(part, ToolCall)
        if change := _change(part):
            events.append(_event("content_block_delta", {"index": self._num_blocks, "delta": change}))
        return events

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        self._num_blocks += 1
        return [_event("content_block_stop", {"index": self._num_blocks - 1})]


def _empty(part: Part) -> TextBlock | ThinkingBlock | ToolUseBlock:
    if isinstance(part, ToolCall):
        return ToolUseBlock(part.call_id or new_call_id(), part.name or "", {})
    return ThinkingBlock("") if isinstance(part, Reasoning) else TextBlock("")


def _change(part: Part) -> dict[str, str] | None:
    match part:
        case Text("") | Reasoning("") | ToolCall(arguments=""):
            return None
        case Text(text):
            return {"type": "text_delta", "text": text}
        case Reasoning(text):
            return {"type": "thinking_delta", "thinking": text}
        case ToolCall(arguments=arguments):
            return {"type": "input_json_delta", "partial_json": arguments}
    raise TypeError(f"a message has no place for {part}")


def _event(name: str, fields: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + encode({"type": name, **fields}) + b"\n\n"
