"""The server-sent events of a streamed chat or completion, made from deltas.

Everything that stays the same during a stream is serialised once, so that a piece of plain text costs one JSON string and one concatenation.
"""

from typing import Protocol

import msgspec

from runtime.api.openai.errors import error_event
from runtime.api.openai.responses import Usage, chat_logprobs, encode, finish_word, stop_reason, tool_call_id, usage
from runtime.api.openai.types import StreamOptions
from runtime.errors import RepertoryError
from runtime.generation.parts import Delta, Finish, Part, Reasoning, Refusal, Text, ToolCall
from runtime.interfaces import ServedModel

_DONE = b"data: [DONE]\n\n"
_PLAIN_END = b',"logprobs":null,"finish_reason":null}]'
_LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_encode_json = msgspec.json.Encoder().encode


def encode_text(text: str) -> bytes:
    """Encode a JSON string without characters that some clients take for the end of a line, since they split lines as Unicode does."""
    data = _encode_json(text)
    if text.isascii() or not any(end in text for end in _LINE_ENDS):
        return data
    escaped = data.decode()
    for end, escape in _LINE_ENDS.items():
        escaped = escaped.replace(end, escape)
    return escaped.encode()


class StreamUsage:
    """Token counts of a stream whose sequences run at once, and whether its events carry them."""

    def __init__(self, num_prompt: int, num_sequences: int, per_prompt: int, options: StreamOptions | None) -> None:
        """`per_prompt` sequences share a prompt, which counts once."""
        self.num_sequences = num_sequences
        self.at_end = bool(options and options.include_usage)
        self.always = bool(options and options.continuous_usage_stats and options.include_usage)
        self._num_prompt = num_prompt
        self._per_prompt = per_prompt
        self._num_generated = [0] * num_sequences
        self._num_reasoning = [0] * num_sequences
        self._cached: dict[int, int] = {}  # by prompt

    def take(self, delta: Delta) -> None:
        self._num_generated[delta.index] = delta.num_generated
        self._num_reasoning[delta.index] = delta.num_reasoning
        if delta.cached_tokens is not None:
            self._cached.setdefault(delta.index // self._per_prompt, delta.cached_tokens)

    def so_far(self) -> Usage:
        return usage(self._num_prompt, sum(self._num_generated), sum(self._cached.values()), sum(self._num_reasoning))


class DeltaShape(Protocol):
    """What differs between the APIs. A choice reads `{"index":0,<text_open>"…"<text_close>,"logprobs":…,"finish_reason":…}`."""

    @property
    def text_open(self) -> bytes: ...

    @property
    def text_close(self) -> bytes: ...

    @property
    def empty(self) -> bytes:
        """The member of the choice without content."""

    def content(self, part: Part) -> bytes:
        """Return the member of the choice that carries `part`."""

    def logprobs(self, model: ServedModel, delta: Delta) -> bytes: ...

    def opening(self, model: ServedModel, delta: Delta) -> bytes:
        """Return the choice of an event before a sequence's first one, or nothing."""


class Head(msgspec.Struct, frozen=True):
    """The members that every event of a stream repeats."""

    id: str
    object: str
    created: int
    model: str


class EventChunks:
    """Makes the events of one stream."""

    def __init__(
        self,
        model: ServedModel,
        head: Head,
        counts: StreamUsage,
        shape: DeltaShape,
        *,
        names_function: bool = False,
    ) -> None:
        """`names_function`: the request names the function that must be called, so that the finish reason is "stop"."""
        self.num_events = 0
        self._names_function = names_function
        self._model = model
        self._counts = counts
        self._shape = shape
        self._head = b"data: " + encode(head)[:-1]
        self._opened = [False] * counts.num_sequences
        self._called = [False] * counts.num_sequences
        self._choices = [self._head + b',"choices":[{"index":%d,' % index for index in range(counts.num_sequences)]
        self._prefixes = [choice + shape.text_open for choice in self._choices]
        # With include_usage every event has the field, but only the last one has a value, or all with continuous_usage_stats.
        self._no_usage = b',"usage":null}\n\n' if counts.at_end else b"}\n\n"
        self._plain_suffix = shape.text_close + _PLAIN_END + self._no_usage

    def delta(self, delta: Delta) -> bytes:
        """Return the delta's events, which may be none. Raises Unavailable for a sequence that the runtime ended."""
        self._counts.take(delta)
        parts = delta.parts
        if not delta.logprobs:
            if not parts:
                return b""
            if len(parts) == 1 and not self._counts.always:
                part = parts[0]
                if type(part) is Text and self._opened[delta.index]:
                    self.num_events += 1
                    return self._prefixes[delta.index] + encode_text(part.text) + self._plain_suffix
        return self._full(delta)

    def end(self) -> bytes:
        """Return what follows the last delta: the usage, if it was requested, and the mark of the end."""
        if not self._counts.at_end:
            return _DONE
        return self._head + b',"choices":[],"usage":' + encode(self._counts.so_far()) + b"}\n\n" + _DONE

    def error(self, error: RepertoryError) -> bytes:
        return error_event(error)

    def _full(self, delta: Delta) -> bytes:
        """Return one event per part. The last event carries the log-probabilities and the finish reason."""
        index, finish = delta.index, delta.finish
        parts = delta.parts[:-1] if finish is not None else delta.parts
        self._called[index] = self._called[index] or any(type(part) is ToolCall for part in parts)
        events: list[bytes] = []
        if not self._opened[index]:
            self._opened[index] = True
            if opening := self._shape.opening(self._model, delta):
                events.append(self._head + b',"choices":[' + opening + b"]" + self._usage())
        contents = [self._shape.content(part) for part in parts]
        if not contents or (finish is not None and type(parts[-1]) is not Text):
            contents.append(self._shape.empty if self._called[index] else self._shape.content(Text("")))
        events += [self._choices[index] + content + _PLAIN_END + self._usage() for content in contents[:-1]]
        logprobs = self._shape.logprobs(self._model, delta) if delta.logprobs else b"null"
        last = self._choices[index] + contents[-1] + b',"logprobs":' + logprobs
        events.append(last + self._ending(index, finish) + self._usage())
        self.num_events += len(events)
        return b"".join(events)

    def _ending(self, index: int, finish: Finish | None) -> bytes:
        if finish is None:
            return b',"finish_reason":null}]'
        word = finish_word(self._model, finish.reason, called=self._called[index] and not self._names_function)
        reason = stop_reason(finish.reason, finish.stop)
        return b',"finish_reason":' + encode(word) + b',"stop_reason":' + encode(reason) + b"}]"

    def _usage(self) -> bytes:
        if not self._counts.always:
            return self._no_usage
        return b',"usage":' + encode(self._counts.so_far()) + b"}\n\n"


class ChatDeltas:
    """Chat chunks: OpenAI's `delta` object, with vLLM's and DeepSeek's two names for reasoning."""

    text_open = b'"delta":{"content":'
    text_close = b"}"
    empty = b'"delta":{}'

    def content(self, part: Part) -> bytes:
        match part:
            case Text(text):
                return self.text_open + encode_text(text) + self.text_close
            case Reasoning(text):
                data = encode_text(text)
                return b'"delta":{"reasoning":' + data + b',"reasoning_content":' + data + b"}"
            case Refusal(text):
                return b'"delta":{"refusal":' + encode_text(text) + b"}"
            case ToolCall():
                return b'"delta":{"tool_calls":[' + _call(part) + b"]}"
        raise TypeError(f"a chat chunk has no place for {part}")

    def logprobs(self, model: ServedModel, delta: Delta) -> bytes:
        return encode(chat_logprobs(model.text, delta.tokens, delta.logprobs))

    def opening(self, model: ServedModel, delta: Delta) -> bytes:
        role = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return b'{"index":%d,' % delta.index + role


CHAT_DELTAS = ChatDeltas()


def _call(part: ToolCall) -> bytes:
    """Later pieces of a call leave out `id`, `type` and `name`: clients concatenate what is repeated, and fail on nulls."""
    arguments = encode_text(part.arguments)
    if part.name is None:
        return b'{"index":%d,"function":{"arguments":' % part.index + arguments + b"}}"
    names = b'"id":' + encode(tool_call_id(part)) + b',"type":"function","function":{"name":' + encode_text(part.name)
    return b'{"index":%d,' % part.index + names + b',"arguments":' + arguments + b"}}"
