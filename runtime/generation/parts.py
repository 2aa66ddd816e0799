"""Defines what generation yields: typed parts of a sequence's output, in deltas as they come or completed as a whole."""

from collections.abc import Iterable

import msgspec

from runtime.ipc.messages import TokenLogprobs
from runtime.types import FinishReason


class Text(msgspec.Struct, frozen=True, gc=False):
    """A piece of the answer."""

    text: str


class Reasoning(msgspec.Struct, frozen=True, gc=False):
    """A piece of the model's reasoning before its answer."""

    text: str


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """A piece of an explanation of why the model does not answer."""

    text: str


class ToolCall(msgspec.Struct, frozen=True, gc=False):
    """A piece of a tool call. Only a call's first piece has `call_id` and `name`; the `arguments` of all pieces together are JSON."""

    index: int  # which of the sequence's calls this is, from 0
    arguments: str = ""
    call_id: str | None = None
    name: str | None = None


class Finish(msgspec.Struct, frozen=True, gc=False):
    """The end of a sequence. `stop` is the stop string, or the id of the EOS or stop token."""

    reason: FinishReason
    stop: str | int | None = None


Part = Text | Reasoning | Refusal | ToolCall | Finish


class Delta(msgspec.Struct, frozen=True, gc=False):
    """New output of one sequence. Its parts may lag behind its tokens (half a character, a possible stop string)."""

    index: int
    parts: tuple[Part, ...]  # Finish, if there is one, comes last
    tokens: tuple[int, ...]
    num_generated: int  # tokens of the sequence so far, these included
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token, if requested
    offsets: tuple[
        int, ...
    ] = ()  # where each token's text begins in the output, in characters; if logprobs were requested
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # in the first delta, if requested
    cached_tokens: int | None = None  # in the first delta
    num_reasoning: int = 0  # of `num_generated`, those in the model's reasoning

    @property
    def text(self) -> str:
        """The answer's new text, for APIs that have no place for other parts."""
        parts = self.parts
        if len(parts) == 1 and type(parts[0]) is Text:
            return parts[0].text
        return _joined(parts, Text)

    @property
    def finish(self) -> Finish | None:
        last = self.parts[-1] if self.parts else None
        return last if type(last) is Finish else None


class Completed(msgspec.Struct, frozen=True):
    """A whole sequence. Each tool call is in one piece."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish: FinishReason
    stop: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    offsets: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    cached_tokens: int
    num_reasoning: int = 0  # tokens
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def join(deltas: list[Delta]) -> Completed:
    """Join all deltas of one sequence, in order; the last one must have a Finish."""
    first, finish = deltas[0], deltas[-1].finish
    assert finish is not None
    parts = [part for delta in deltas for part in delta.parts]
    return Completed(
        index=first.index,
        text=_joined(parts, Text),
        tokens=tuple([token for delta in deltas for token in delta.tokens]),
        finish=finish.reason,
        stop=finish.stop,
        logprobs=tuple([entry for delta in deltas for entry in delta.logprobs]),
        offsets=tuple([offset for delta in deltas for offset in delta.offsets]),
        prompt_logprobs=first.prompt_logprobs,
        cached_tokens=first.cached_tokens or 0,
        num_reasoning=deltas[-1].num_reasoning,
        reasoning=_joined(parts, Reasoning),
        refusal=_joined(parts, Refusal),
        tool_calls=_joined_calls(parts),
    )


def _joined(parts: Iterable[Part], kind: type[Text] | type[Reasoning] | type[Refusal]) -> str:
    return "".join([part.text for part in parts if isinstance(part, kind)])


def _joined_calls(parts: Iterable[Part]) -> tuple[ToolCall, ...]:
    calls: dict[int, ToolCall] = {}
    for part in parts:
        if isinstance(part, ToolCall):
            begun = calls.get(part.index)
            calls[part.index] = (
                part if begun is None else msgspec.structs.replace(begun, arguments=begun.arguments + part.arguments)
            )
    return tuple(calls.values())
