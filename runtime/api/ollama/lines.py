"""The lines of an answer of Ollama's API, made from deltas: one for each delta of a stream, or one for the whole."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from runtime.api.ollama.types import Call, ChatLine, ErrorAnswer, GenerateLine, Line, Message, ToolCall
from runtime.api.openai.responses import chat_logprobs, encode, finish_word
from runtime.errors import RepertoryError
from runtime.generation.parts import Delta, Finish, Reasoning, join
from runtime.generation.parts import ToolCall as CallPart
from runtime.interfaces import ServedModel


class Content(msgspec.Struct, frozen=True):
    """What one line carries."""

    text: str = ""
    thinking: str = ""
    calls: tuple[CallPart, ...] = ()


MakeLine = Callable[[Content, dict[str, Any]], Line]


def chat_line(content: Content, fields: dict[str, Any]) -> Line:
    calls = [ToolCall(Call(call.name or "", msgspec.json.decode(call.arguments or "{}"))) for call in content.calls]
    thinking = content.thinking or msgspec.UNSET
    message = Message(role="assistant", content=content.text, thinking=thinking, tool_calls=calls or msgspec.UNSET)
    return ChatLine(message=message, **fields)


def generate_line(content: Content, fields: dict[str, Any]) -> Line:
    return GenerateLine(response=content.text, thinking=content.thinking or msgspec.UNSET, **fields)


def loaded_line(shown_name: str, make: MakeLine) -> Line:
    """Return the answer to a request without a prompt, which only loads the model."""
    return make(Content(), {"model": shown_name, "created_at": _now(), "done": True, "done_reason": "load"})


class AnswerLines:
    """Makes the lines of one answer. Time counts from here. `make` writes a line of the API in question."""

    def __init__(
        self,
        model: ServedModel,
        shown_name: str,
        num_prompt: int,
        make: MakeLine,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.num_events = 0
        self._model = model
        self._shown_name = shown_name
        self._num_prompt = num_prompt
        self._make = make
        self._clock = clock
        self._start_ns = clock()
        self._first_ns = 0
        self._last: Line | None = None

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's line, without its end. Raises Unavailable for a sequence that the runtime ended."""
        self.note_first()
        if (finish := delta.finish) is not None:
            self._last = self._line(Content(), self._ending(finish, delta.num_generated))
        calls = tuple(part for part in delta.parts if isinstance(part, CallPart))
        thinking = "".join(part.text for part in delta.parts if isinstance(part, Reasoning))
        if not (delta.text or thinking or calls or delta.logprobs):
            return b""
        self.num_events += 1
        return encode(self._line(Content(delta.text, thinking, calls), self._logprobs(delta))) + b"\n"

    def end(self) -> bytes:
        assert self._last is not None
        return encode(self._last) + b"\n"

    def error(self, error: RepertoryError) -> bytes:
        return encode(ErrorAnswer(error.message)) + b"\n"

    def note_first(self) -> None:
        """Note the time of the first delta, for an answer that is sent as a whole."""
        self._first_ns = self._first_ns or self._clock()

    def whole(self, deltas: list[Delta]) -> Line:
        """Return the answer of all deltas. Raises Unavailable if the runtime ended the sequence."""
        result = join(deltas)
        logprobs = chat_logprobs(self._model.text, result.tokens, result.logprobs).content if result.logprobs else None
        fields = self._ending(Finish(result.finish, result.stop), len(result.tokens))
        if logprobs is not None:
            fields["logprobs"] = logprobs
        return self._line(Content(result.text, result.reasoning, result.tool_calls), fields)

    def _line(self, content: Content, fields: dict[str, Any]) -> Line:
        return self._make(content, {"model": self._shown_name, "created_at": _now(), **fields})

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        if not delta.logprobs:
            return {}
        return {"logprobs": chat_logprobs(self._model.text, delta.tokens, delta.logprobs).content}

    def _ending(self, finish: Finish, num_generated: int) -> dict[str, Any]:
        now_ns = self._clock()
        return {
            "done": True,
            "done_reason": finish_word(self._model, finish.reason),
            "total_duration": now_ns - self._start_ns,
            "load_duration": 0,
            "prompt_eval_count": self._num_prompt,
            "prompt_eval_duration": self._first_ns - self._start_ns,
            "eval_count": num_generated,
            "eval_duration": now_ns - self._first_ns,
        }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
