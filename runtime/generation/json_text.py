"""Reads JSON from text that arrives in pieces, and passes values on before they are complete."""

import re
from collections.abc import Callable

import msgspec

from runtime.generation.text_source import TextSource, Wait

_STRUCTURE = re.compile(r'[{}\[\]"]')
_IN_STRING = re.compile(r'["\\]')
_AFTER_SCALAR = re.compile(r"[\s,}\]]")


class MalformedCall(Exception):
    """The text is not a tool call of the expected syntax."""


def expect(source: TextSource, literal: str) -> Wait[None]:
    if not (yield from source.skip(literal)):
        raise MalformedCall


def stream_object(source: TextSource, emit: Callable[[str], None]) -> Wait[None]:
    """Pass an object or array on as it comes, up to the bracket that closes it. Raises MalformedCall if that does not come."""
    depth, quoted = 0, False
    while True:
        text, at = source.text, 0
        while at < len(text):
            found = (_IN_STRING if quoted else _STRUCTURE).search(text, at)
            if found is None:
                at = len(text)
                break
            character = found.group()
            if character == "\\":
                if found.end() == len(text):
                    at = found.start()
                    break
                at = found.end() + 1
                continue
            at = found.end()
            if character == '"':
                quoted = not quoted
            else:
                depth += 1 if character in "{[" else -1
                if depth == 0:
                    emit(source.take(at))
                    return
        if at:
            emit(source.take(at))
        if source.ended:
            raise MalformedCall
        yield


def read_string(source: TextSource) -> Wait[str]:
    """Return a string's value. Raises MalformedCall."""
    start = 1
    while True:
        text = source.text
        if text and text[0] != '"':
            raise MalformedCall
        while (found := _IN_STRING.search(text, start)) is not None:
            if found.group() == '"':
                return str(decode(source.take(found.end())))
            if found.end() == len(text):
                break
            start = found.end() + 1
        else:
            start = max(1, len(text))
        if source.ended:
            raise MalformedCall
        yield


def read_value(source: TextSource) -> Wait[object]:
    """Return a value of any type. Raises MalformedCall."""
    first = yield from source.peek()
    if first == '"':
        return (yield from read_string(source))
    if first in ("{", "["):
        pieces: list[str] = []
        yield from stream_object(source, pieces.append)
        return decode("".join(pieces))
    while (found := _AFTER_SCALAR.search(source.text)) is None:
        if source.ended:
            raise MalformedCall
        yield
    return decode(source.take(found.start()))


def decode(text: str) -> object:
    """Decode JSON. Raises MalformedCall."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise MalformedCall from error


def cast_text(text: str) -> str:
    """Return the JSON of a value that was written as plain text: what it says if it is JSON or a constant of Python, or else a string."""
    try:
        return encode(decode(text.strip()))
    except MalformedCall:
        pass
    constants = {"true": "true", "false": "false", "none": "null"}
    return constants.get(text.strip().lower(), encode(text))


def encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
