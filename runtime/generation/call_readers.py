"""Provides readers of tool calls, one for each syntax, which take a call's text from a source and report its pieces to a sink.

All raise MalformedCall for a text that is not a call of their syntax.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from runtime.generation.call_sink import CallSink
from runtime.generation.json_text import (
    MalformedCall,
    cast_text,
    decode,
    encode,
    expect,
    read_string,
    read_value,
    stream_object,
)
from runtime.generation.text_source import TextSource, Wait, before_newline
from runtime.text.output_format import CallSyntax, JsonCalls, NamedCalls, PythonCalls, QuotedCalls, TaggedCalls
from runtime.text.tagged_values import is_raw_text

Tools = Mapping[str, Mapping[str, Any]]  # the parameters' JSON schema, by the function's name
_HEADER_CHARS = 512
_CALL_KEYS = ("name", "arguments", "parameters", "type", "id")
_BARE_KEY = re.compile(r"([{,]\s*)([\w.$-]+)\s*:")


def read_calls(source: TextSource, sink: CallSink, syntax: CallSyntax, tools: Tools, *, known_only: bool) -> Wait[None]:
    """Read what follows a trigger. `known_only`: only a call of one of `tools` is a call."""
    match syntax:
        case JsonCalls():
            yield from _read_json(source, sink, tools if known_only else None)
            yield from _skip_ends(source, syntax.ends)
        case NamedCalls():
            yield from _read_named(source, sink, syntax)
        case TaggedCalls():
            yield from _read_tagged(source, sink, syntax, tools)
        case PythonCalls():
            yield from _read_python(source, sink, syntax, tools)
        case QuotedCalls():
            yield from _read_quoted(source, sink, syntax)


def _read_json(source: TextSource, sink: CallSink, known: Tools | None) -> Wait[None]:
    yield from source.skip_space()
    if not (yield from source.skip("[")):
        yield from _read_json_call(source, sink, known)
        return
    while True:
        yield from source.skip_space()
        if (yield from source.skip("]")):
            return
        if not (yield from source.skip(",")):
            yield from _read_json_call(source, sink, known)


def _read_json_call(source: TextSource, sink: CallSink, known: Tools | None) -> Wait[None]:
    yield from expect(source, "{")
    name: str | None = None
    call_id: str | None = None
    arguments: object = {}
    streamed = False
    while True:
        yield from source.skip_space()
        if (yield from source.skip("}")):
            break
        if (yield from source.skip(",")):
            continue
        key = yield from read_string(source)
        if known is not None and key not in _CALL_KEYS:
            raise MalformedCall
        yield from source.skip_space()
        yield from expect(source, ":")
        yield from source.skip_space()
        if key == "name":
            name = yield from read_string(source)
            if known is not None and name not in known:
                raise MalformedCall
        elif key not in ("arguments", "parameters"):
            value = yield from read_value(source)
            call_id = value if key == "id" and isinstance(value, str) else call_id
        elif name is not None and (yield from source.peek()) == "{":
            sink.begin(name, call_id)
            streamed = True
            yield from stream_object(source, sink.arguments)
        else:
            arguments = yield from read_value(source)
    if name is None:
        raise MalformedCall
    if not streamed:
        if isinstance(arguments, str):
            arguments = decode(arguments)
        if not isinstance(arguments, dict):
            raise MalformedCall
        sink.begin(name, call_id)
        sink.arguments(encode(arguments))
    sink.end()
    source.record()


def _read_named(source: TextSource, sink: CallSink, syntax: NamedCalls) -> Wait[None]:
    if syntax.or_json:
        yield from source.skip_space()
        if (yield from source.peek()) in ("[", "{"):
            yield from _read_json(source, sink, None)
            return
    found = yield from source.up_to((syntax.separator,), _HEADER_CHARS)
    header = syntax.header.fullmatch(found[0]) if found else None
    if header is None:
        raise MalformedCall
    yield from source.skip_space()
    if (yield from source.peek()) != "{":
        raise MalformedCall
    sink.begin(header["name"], header.groupdict().get("id"))
    yield from stream_object(source, sink.arguments)
    sink.end()
    source.record()
    yield from _skip_ends(source, syntax.ends)


def _read_tagged(source: TextSource, sink: CallSink, syntax: TaggedCalls, tools: Tools) -> Wait[None]:
    found = yield from source.up_to((syntax.key_open, syntax.end), _HEADER_CHARS)
    header = syntax.header.fullmatch(found[0]) if found else None
    if found is None or header is None:
        raise MalformedCall
    name = header["name"].strip()
    properties = tools.get(name, {}).get("properties")
    sink.begin(name)
    sink.arguments("{")
    separator = ""
    while found[1] != syntax.end:
        key = yield from source.up_to((syntax.value_open,), _HEADER_CHARS)
        if key is None:
            raise MalformedCall
        label = key[0].strip().removesuffix(syntax.key_close).strip()
        sink.arguments(f"{separator}{encode(label)}: ")
        schema = properties.get(label) if isinstance(properties, dict) else None
        yield from _read_tagged_value(source, sink, syntax, schema)
        separator = ", "
        found = yield from source.up_to((syntax.key_open, syntax.end))
        if found is None or found[0].strip():
            raise MalformedCall
    sink.arguments("}")
    sink.end()
    source.record()
    yield from _skip_ends(source, syntax.ends)


def _read_tagged_value(source: TextSource, sink: CallSink, syntax: TaggedCalls, schema: object) -> Wait[None]:
    """Read a value without its first and last line end. One that is not raw text is JSON, if it can be read so."""
    yield from source.skip("\n")
    if not is_raw_text(schema):
        raw = yield from source.up_to((syntax.value_close,))
        if raw is None:
            raise MalformedCall
        sink.arguments(cast_text(raw[0].removesuffix("\n")))
        return
    sink.arguments('"')
    _, close = yield from source.stream(
        (syntax.value_close,), lambda text: sink.arguments(encode(text)[1:-1]), before_newline
    )
    if not close:
        raise MalformedCall
    sink.arguments('"')


def _read_python(source: TextSource, sink: CallSink, syntax: PythonCalls, tools: Tools) -> Wait[None]:
    yield from expect(source, "[")
    while (found := re.match(r"\s*([\w.]+)\s*\(", source.text)) is None:
        if source.ended or not re.fullmatch(r"\s*[\w.]*\s*", source.text):
            raise MalformedCall
        yield
    if found[1] not in tools:
        raise MalformedCall
    while not source.ended:
        yield
    written = source.text.partition(syntax.end)[0]
    try:
        tree = ast.parse("[" + written.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedCall from error
    calls = [_python_call(node) for node in tree.elts] if isinstance(tree, ast.List) else []
    if not calls:
        raise MalformedCall
    for name, arguments in calls:
        sink.begin(name)
        sink.arguments(encode(arguments))
        sink.end()
    source.take(len(written))
    yield from source.skip(syntax.end)
    source.record()


def _python_call(node: ast.expr) -> tuple[str, dict[str, object]]:
    if not isinstance(node, ast.Call) or node.args:
        raise MalformedCall
    try:
        arguments = {item.arg: ast.literal_eval(item.value) for item in node.keywords if item.arg}
        encode(arguments)
    except (ValueError, TypeError, RecursionError) as error:
        raise MalformedCall from error
    return ast.unparse(node.func), arguments


def _read_quoted(source: TextSource, sink: CallSink, syntax: QuotedCalls) -> Wait[None]:
    found = yield from source.up_to((syntax.end,))
    name, brace, body = found[0].partition("{") if found else ("", "", "")
    if not brace or not name.strip():
        raise MalformedCall
    pieces = (brace + body).split(syntax.quote)
    text = "".join(
        encode(piece) if index % 2 else _BARE_KEY.sub(r'\1"\2":', piece) for index, piece in enumerate(pieces)
    )
    arguments = decode(text)
    if not isinstance(arguments, dict):
        raise MalformedCall
    sink.begin(name.strip())
    sink.arguments(encode(arguments))
    sink.end()
    source.record()


def _skip_ends(source: TextSource, ends: tuple[str, ...]) -> Wait[None]:
    """Skip what ends a call, or its beginning where the output was cut inside of it."""
    for end in ends:
        yield from source.skip_space()
        if not (yield from source.skip(end)) and source.ended and end.startswith(source.text):
            source.take(len(source.text))
