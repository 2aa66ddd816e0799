"""The server-sent events of a streamed response of the Responses API, made from deltas."""

from typing import Any

import msgspec

from runtime.api.openai.errors import error_code
from runtime.api.openai.responses import encode, tool_call_id
from runtime.api.openai_responses.items import (
    CallItem,
    Failure,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Response,
    end_status,
    ended,
    new_id,
    response_usage,
)
from runtime.errors import RepertoryError
from runtime.generation.parts import Delta, Finish, Part, Reasoning, Text, ToolCall
from runtime.interfaces import ServedModel


class ResponseEvents:
    """Makes the events of one response. Its items come one after another; each event has a rising number."""

    def __init__(self, model: ServedModel, response: Response, num_prompt: int) -> None:
        self.num_events = 0
        self._model = model
        self._response = response
        self._num_prompt = num_prompt
        self._num_cached = 0
        self._output: list[Item] = []
        self._item: Item | None = None  # the open one, without content
        self._call_index = 0
        self._pieces: list[str] = []

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's events. Raises Unavailable for a sequence that the runtime ended."""
        events: list[bytes] = []
        if not self.num_events:
            self._num_cached = delta.cached_tokens or 0
            events += [self._event(f"response.{name}", response=self._response) for name in ("created", "in_progress")]
        for part in delta.parts:
            if isinstance(part, Finish):
                status = end_status(self._model, part.reason)
                events += self._close(status)
                usage = response_usage(self._num_prompt, delta.num_generated, self._num_cached, delta.num_reasoning)
                self._response = ended(self._response, status, self._output, usage)
            else:
                events += self._content(part)
        return b"".join(events)

    def end(self) -> bytes:
        return self._event(f"response.{self._response.status}", response=self._response)

    def error(self, error: RepertoryError) -> bytes:
        failed = msgspec.structs.replace(
            self._response, status="failed", output=self._output, error=Failure(error_code(error), error.message)
        )
        return self._event("response.failed", response=failed)

    def _content(self, part: Part) -> list[bytes]:
        events: list[bytes] = []
        if not self._continues(part):
            events += self._close()
            events += self._open(part)
        match part:
            case Text(text) if text:
                events.append(self._piece("response.output_text.delta", text, content_index=0, logprobs=[]))
            case Reasoning(text) if text:
                events.append(self._piece("response.reasoning_text.delta", text, content_index=0))
            case ToolCall(arguments=text) if text:
                events.append(self._piece("response.function_call_arguments.delta", text))
        return events

    def _continues(self, part: Part) -> bool:
        match part, self._item:
            case (Text(), MessageItem()) | (Reasoning(), ReasoningItem()):
                return True
            case ToolCall(index), CallItem():
                return index == self._call_index
        return False

    def _open(self, part: Part) -> list[bytes]:
        self._pieces = []
        match part:
            case ToolCall(index):
                self._call_index = index
                self._item = CallItem(new_id("fc"), tool_call_id(part), part.name or "", "", "in_progress")
            case Reasoning():
                self._item = ReasoningItem(new_id("rs"), [], "in_progress")
            case Text():
                self._item = MessageItem(new_id("msg"), [], "in_progress")
            case _:
                raise TypeError(f"a response has no place for {part}")
        events = [self._event("response.output_item.added", item=self._item, output_index=len(self._output))]
        if isinstance(self._item, MessageItem):
            events.append(self._placed("response.content_part.added", content_index=0, part=OutputText("")))
        return events

    def _close(self, status: str = "completed") -> list[bytes]:
        item, text = self._item, "".join(self._pieces)
        events: list[bytes] = []
        match item:
            case None:
                return events
            case MessageItem():
                part = OutputText(text)
                item = msgspec.structs.replace(item, content=[part], status=status)
                events.append(self._placed("response.output_text.done", content_index=0, text=text, logprobs=[]))
                events.append(self._placed("response.content_part.done", content_index=0, part=part))
            case ReasoningItem():
                item = msgspec.structs.replace(item, content=[ReasoningText(text)], status=status)
                events.append(self._placed("response.reasoning_text.done", content_index=0, text=text))
            case CallItem():
                item = msgspec.structs.replace(item, arguments=text, status=status)
                done = self._placed("response.function_call_arguments.done", arguments=text, name=item.name)
                events.append(done)
        events.append(self._event("response.output_item.done", item=item, output_index=len(self._output)))
        self._output.append(item)
        self._item = None
        return events

    def _piece(self, name: str, text: str, /, **fields: Any) -> bytes:
        self._pieces.append(text)
        return self._placed(name, delta=text, **fields)

    def _placed(self, name: str, /, **fields: Any) -> bytes:
        """Return an event of the open item."""
        assert self._item is not None
        return self._event(name, item_id=self._item.id, output_index=len(self._output), **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = encode({"type": name, "sequence_number": self.num_events, **fields})
        self.num_events += 1
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
