"""Splits a model's output into answer, reasoning and tool calls by the checkpoint's own response template."""

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.generation.call_readers import read_calls
from runtime.generation.call_sink import CallSink
from runtime.generation.format_parser import ParserOptions
from runtime.generation.json_text import MalformedCall, cast_text, decode, encode, stream_object
from runtime.generation.parts import Part, Reasoning, Text
from runtime.generation.regions import Closed, Event, Opened, Piece, RegionScanner
from runtime.generation.text_source import TextSource, Wait
from runtime.text.output_format import CallIds, JsonCalls
from runtime.text.response_template import MalformedRegion, Region, ResponseTemplate
from runtime.text.tagged_values import is_raw_text

_CALL_OBJECTS = ("{content}", "{content.arguments}", "{content.parameters}", "{arguments}", "{parameters}")


class TemplateParser:
    """An OutputParser for one sequence. `tail`: the part of the prompt that belongs to the answer already.

    A call that is not well-formed is a part of the answer, as the model wrote it. In a stream, arguments that are JSON are sent as they come.
    Regions that are neither answer, reasoning nor calls are left out.
    """

    def __init__(self, template: ResponseTemplate, call_ids: CallIds, tail: str, options: ParserOptions) -> None:
        self._options = options
        self._scanner = RegionScanner(template)
        self._parts: list[Part] = []
        self._sink = CallSink(
            self._parts.append, call_ids, whole=options.whole_calls, single=not options.parallel_calls
        )
        self._region: Region | None = None
        self._captures: dict[str, str] = {}
        self._body: list[str] = []  # of a region of calls
        self._mark = ""
        self._call: _StreamedCall | None = None
        self._space = ""  # white space that is part of the text only if more follows
        self._began: set[str] = set()  # the names of regions that have text
        self._fresh = True  # no text of the open region has come
        for event in self._scanner.feed(tail):
            self._take(event)
        self._parts.clear()
        self._fresh = True

    @property
    def in_reasoning(self) -> bool:
        return self._region is not None and self._region.is_reasoning

    @property
    def num_calls(self) -> int:
        return self._sink.num_calls

    def push(self, text: str) -> tuple[Part, ...]:
        return self._taken(self._scanner.feed(text))

    def flush(self) -> tuple[Part, ...]:
        return self._taken(self._scanner.end())

    def _taken(self, events: list[Event]) -> tuple[Part, ...]:
        for event in events:
            self._take(event)
        found = tuple(self._parts)
        self._parts.clear()
        return found

    def _take(self, event: Event) -> None:
        match event:
            case Opened(region, mark, captures):
                self._region, self._captures, self._mark, self._body = region, captures, mark, []
                self._space, self._fresh, self._call = "", True, None
                if region.is_calls and not self._options.whole_calls and self._options.tools is not None:
                    self._call = _streamed(
                        region, captures, self._sink, self._options.tools, known_only=not mark.strip()
                    )
            case Piece(text) if self._region is not None:
                if self._region.is_calls:
                    self._body.append(text)
                    if self._call is not None:
                        self._call.feed(text)
                else:
                    self._emit(self._region, text)
            case Closed(mark, captures) if self._region is not None:
                if self._region.is_calls:
                    self._end_calls(self._region, mark, {**self._captures, **captures})
                self._region = None
            case _:
                raise AssertionError("a region has text or ends before it begins")

    def _emit(self, region: Region, text: str) -> None:
        if region.is_stripped:
            text = self._space + text
            if self._fresh:
                text = text.lstrip()
            kept = text.rstrip()
            self._space, text = text[len(kept) :], kept
        if not text:
            return
        if self._fresh and region.name in self._began:
            text = region.join + text
        self._fresh = False
        self._began.add(region.name)
        if region.is_answer:
            self._parts.append(Text(text))
        elif region.is_reasoning and self._options.show_reasoning:
            self._parts.append(Reasoning(text))

    def _end_calls(self, region: Region, mark: str, captures: Mapping[str, str]) -> None:
        body = "".join(self._body)
        written = f"{self._mark}{body}{mark}"
        if self._options.tools is None:
            self._parts.append(Text(written))
            return
        if self._call is not None and self._call.end():
            return
        try:
            value = region.value(body if mark else region.without_cut_mark(body), captures)
            calls = [
                _call_of(region, entry, self._options.tools)
                for entry in (value if isinstance(value, list) else [value])
            ]
            if not self._mark.strip() and any(name not in self._options.tools for name, _, _ in calls):
                raise MalformedCall
        except (MalformedRegion, MalformedCall):
            self._parts.append(Text(written))
            return
        for name, call_id, arguments in calls:
            self._sink.begin(name, call_id)
            self._sink.arguments(arguments)
            self._sink.end()


class _StreamedCall:
    """Sends the calls of one region as their text comes."""

    def __init__(self, source: TextSource, sink: CallSink, reading: Wait[None]) -> None:
        self._source = source
        self._sink = sink
        self._reading: Iterator[None] | None = reading
        self._sent = sink.num_calls
        self._done = False

    def feed(self, text: str) -> None:
        self._source.feed(text)
        self._advance()

    def end(self) -> bool:
        """End the region. Returns whether the client has got its calls, or a part of them, which cannot be undone."""
        self._source.end()
        self._advance()
        return self._done or self._sink.num_calls > self._sent

    def _advance(self) -> None:
        if self._reading is None:
            return
        try:
            next(self._reading)
        except StopIteration:
            self._reading, self._done = None, True
        except MalformedCall:
            self._reading = None
            if self._sink.is_open:
                self._sink.abandon()


def _streamed(
    region: Region,
    captures: Mapping[str, str],
    sink: CallSink,
    tools: Mapping[str, Mapping[str, Any]],
    *,
    known_only: bool,
) -> _StreamedCall | None:
    """Return a reader of the region's calls, or None if the output does not contain their arguments verbatim as JSON."""
    transform = (
        region.transform[0] if isinstance(region.transform, list) and len(region.transform) == 1 else region.transform
    )
    if not region.is_plain_json or not isinstance(transform, dict):
        return None
    source = TextSource()
    match transform.get("function"):
        case "{content}" | {"name": "{content.name}" | "{name}", "arguments": str()} as function:
            name = captures.get("name")
            if isinstance(function, dict) and name is not None:
                if function["arguments"] != "{content}":
                    return None
                call_id = captures.get(str(transform.get("id", "")).strip("{}"))
                return _StreamedCall(source, sink, _read_arguments(source, sink, name, call_id))
            if isinstance(function, dict) and function["arguments"] not in _CALL_OBJECTS:
                return None
            return _StreamedCall(source, sink, read_calls(source, sink, JsonCalls(), tools, known_only=known_only))
    return None


def _read_arguments(source: TextSource, sink: CallSink, name: str, call_id: str | None) -> Wait[None]:
    yield from source.skip_space()
    if (yield from source.peek()) != "{":
        raise MalformedCall
    sink.begin(name, call_id)
    yield from stream_object(source, sink.arguments)
    sink.end()


def _call_of(region: Region, value: object, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, str | None, str]:
    """Return the name, the id and the arguments of a call, as JSON. Raises MalformedCall."""
    match value:
        case {"function": {"name": str(name)} as function, **others}:
            arguments, call_id = function.get("arguments"), others.get("id")
        case _:
            raise MalformedCall
    if isinstance(arguments, str):
        arguments = decode(arguments)
    if not isinstance(arguments, dict):
        raise MalformedCall
    if region.is_raw_text:
        properties = tools.get(name, {}).get("properties")
        schemas = properties if isinstance(properties, dict) else {}
        arguments = {
            key: decode(cast_text(text)) if isinstance(text, str) and not is_raw_text(schemas.get(key)) else text
            for key, text in arguments.items()
        }
    return name, call_id if isinstance(call_id, str) else None, encode(arguments)
