"""Splits a model's output into answer, reasoning and tool calls, in the format of its family."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.generation.call_readers import read_calls
from runtime.generation.call_sink import CallSink
from runtime.generation.json_text import MalformedCall
from runtime.generation.parts import Part, Reasoning, Text
from runtime.generation.text_source import TextSource, Wait
from runtime.text.output_format import OutputFormat


@dataclass(frozen=True, slots=True)
class ParserOptions:
    """What the request determines about the output. `tools`: the parameters' JSON schema by name; None = no call is read."""

    tools: Mapping[str, Mapping[str, Any]] | None = None
    parallel_calls: bool = True
    whole_calls: bool = False  # a call comes in one piece, and only if it is well-formed
    starts_in_reasoning: bool = False  # the prompt has opened the reasoning
    show_reasoning: bool = True


class FormatParser:
    """An OutputParser for one sequence. A call that is not well-formed is a part of the answer, as the model wrote it.

    In a stream, arguments are sent as they come, so that those of a call which ends too early stay incomplete.
    """

    def __init__(self, output_format: OutputFormat, options: ParserOptions) -> None:
        self._format = output_format
        self._options = options
        self._source = TextSource()
        self._parts: list[Part] = []
        self.in_reasoning = False
        self._sink = CallSink(
            self._parts.append,
            output_format.call_ids,
            whole=options.whole_calls,
            single=not options.parallel_calls,
        )
        self._parsing = self._parse()

    @property
    def num_calls(self) -> int:
        return self._sink.num_calls

    def push(self, text: str) -> tuple[Part, ...]:
        self._source.feed(text)
        return self._advance()

    def flush(self) -> tuple[Part, ...]:
        self._source.end()
        return self._advance()

    def _advance(self) -> tuple[Part, ...]:
        next(self._parsing, None)
        found = tuple(self._parts)
        self._parts.clear()
        return found

    def _parse(self) -> Generator[None, None, None]:
        output = self._format
        if self._options.starts_in_reasoning or (
            output.reasoning is not None and (yield from self._reasoning_opens(output.reasoning[0]))
        ):
            yield from self._read_reasoning()
        triggers = output.triggers if self._options.tools is not None else ()
        if self._options.tools is not None and output.calls is not None and not triggers:
            yield from self._read_leading_call()
        again = output.reasoning[0] if output.reasoning is not None and output.reasons_again else None
        literals = (*triggers, *output.ignored, *(() if again is None else (again,)))
        while not self._source.ended or self._source.text:
            space, literal = yield from self._source.stream(literals, self._answer)
            if literal in triggers:
                yield from self._read_calls(space + literal, known_only=False)
                yield from self._source.skip_space()
            elif again is not None and literal == again:
                yield from self._read_reasoning()
            elif space and not literal and not self._sink.num_calls:
                self._answer(space)

    def _reasoning_opens(self, marker: str) -> Wait[bool]:
        self._source.record()
        yield from self._source.skip_space()
        opened = yield from self._source.skip(marker)
        blank = self._source.recorded()
        if not opened:
            self._source.restore(blank)
        return opened

    def _read_reasoning(self) -> Wait[None]:
        assert self._format.reasoning is not None
        self.in_reasoning = True
        yield from self._source.skip_space()
        yield from self._source.stream((self._format.reasoning[1],), self._reason)
        self.in_reasoning = False
        yield from self._source.skip_space()

    def _read_leading_call(self) -> Wait[None]:
        for marker in self._format.ignored:
            yield from self._source.skip(marker)
        if (yield from self._source.peek()) in ("{", "["):
            yield from self._read_calls("", known_only=True)

    def _read_calls(self, trigger: str, *, known_only: bool) -> Wait[None]:
        assert self._format.calls is not None
        source, sink = self._source, self._sink
        source.record(trigger)
        try:
            yield from read_calls(source, sink, self._format.calls, self._options.tools or {}, known_only=known_only)
        except MalformedCall:
            written = source.recorded()
            if sink.is_open:
                sink.abandon()
            else:
                self._answer(written)
        else:
            source.recorded()

    def _answer(self, text: str) -> None:
        self._parts.append(Text(text))

    def _reason(self, text: str) -> None:
        if self._options.show_reasoning:
            self._parts.append(Reasoning(text))
