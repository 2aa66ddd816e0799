"""The events of a streamed chat or completion: bytes made from deltas, with all that doesn't change serialised once.

Knows the JSON shapes; nothing of connections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from runtime.api.openai.responses import Usage, encode, finish_word, stop_reason, usage
from runtime.api.openai.types import StreamOptions
from runtime.generation.request import Delta
from runtime.interfaces import ServedModel

_PLAIN_END = b',"logprobs":null,"finish_reason":null}]'
_LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_encode_json = msgspec.json.Encoder().encode


def _encode_text(text: str) -> bytes:
    """As JSON without anything that a client might take for a line's end: some split lines as Unicode does."""
    data = _encode_json(text)
    if text.isascii() or not any(end in text for end in _LINE_ENDS):
        return data
    escaped = data.decode()
    for end, escape in _LINE_ENDS.items():
        escaped = escaped.replace(end, escape)
    return escaped.encode()


class StreamUsage:
    """Counts of a stream whose sequences go on at once, and when to tell them."""

    def __init__(self, num_prompt: int, num_sequences: int, per_prompt: int, options: StreamOptions | None) -> None:
        """`per_prompt` sequences share a prompt, which counts once."""
        self.num_sequences = num_sequences
        self.at_end = bool(options and options.include_usage)
        self.always = bool(options and options.continuous_usage_stats and options.include_usage)
        self._num_prompt = num_prompt
        self._per_prompt = per_prompt
        self._num_generated = [0] * num_sequences
        self._cached: dict[int, int] = {}  # by prompt

    def take(self, delta: Delta) -> None:
        self._num_generated[delta.index] = delta.num_generated
        if delta.cached_tokens is not None:
            self._cached.setdefault(delta.index // self._per_prompt, delta.cached_tokens)

    def so_far(self) -> Usage:
        return usage(self._num_prompt, sum(self._num_generated), sum(self._cached.values()))


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """What differs between the APIs. A choice reads `{"index":0,<text_open>"…"<text_close>,"logprobs":…,"finish_reason":…}`.

    `opening` is the choice of an event before a sequence's first one, or nothing.
    """

    text_open: bytes
    text_close: bytes
    logprobs: Callable[[Delta], bytes]
    opening: Callable[[Delta], bytes]


class Head(msgspec.Struct, frozen=True):
    """What every event of a stream repeats."""

    id: str
    object: str
    created: int
    model: str


class EventChunks:
    """One stream's events."""

    def __init__(self, model: ServedModel, head: Head, counts: StreamUsage, shape: ChunkShape) -> None:
        self.num_events = 0
        self._model = model
        self._counts = counts
        self._shape = shape
        self._head = b"data: " + encode(head)[:-1]
        self._opened = [False] * counts.num_sequences
        self._prefixes = [
            self._head + b',"choices":[{"index":%d,' % index + shape.text_open for index in range(counts.num_sequences)
        ]
        # with include_usage each event has the field, but only the last a value, or all with continuous_usage_stats
        self._no_usage = b',"usage":null}\n\n' if counts.at_end else b"}\n\n"
        self._plain_suffix = shape.text_close + _PLAIN_END + self._no_usage

    def delta(self, delta: Delta) -> bytes:
        """The delta's events; nothing if it has nothing to say. Raises Unavailable for a sequence that was ended from within."""
        self._counts.take(delta)
        index = delta.index
        if delta.finish is None and not delta.logprobs:
            if not delta.text:
                return b""
            if self._opened[index] and not self._counts.always:
                self.num_events += 1
                return self._prefixes[index] + _encode_text(delta.text) + self._plain_suffix
        return self._full(delta)

    def end(self) -> bytes:
        """After the last delta: the usage, if it was asked for."""
        if not self._counts.at_end:
            return b""
        return self._head + b',"choices":[],"usage":' + encode(self._counts.so_far()) + b"}\n\n"

    def _full(self, delta: Delta) -> bytes:
        self.num_events += 1
        opening = b""
        if not self._opened[delta.index]:
            self._opened[delta.index] = True
            choice = self._shape.opening(delta)
            if choice:
                opening = self._head + b',"choices":[' + choice + b"]" + self._usage()
        ending = b',"finish_reason":null}]'
        if delta.finish is not None:
            word = finish_word(self._model, delta.finish)
            ending = (
                b',"finish_reason":'
                + encode(word)
                + b',"stop_reason":'
                + encode(stop_reason(delta.finish, delta.stop))
                + b"}]"
            )
        logprobs = self._shape.logprobs(delta) if delta.logprobs else b"null"
        event = (
            self._prefixes[delta.index] + _encode_text(delta.text) + self._shape.text_close + b',"logprobs":' + logprobs
        )
        return opening + event + ending + self._usage()

    def _usage(self) -> bytes:
        if not self._counts.always:
            return self._no_usage
        return b',"usage":' + encode(self._counts.so_far()) + b"}\n\n"


def num_prompt_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Each prompt counts once, however many sequences come of it."""
    return sum(map(len, prompts))
