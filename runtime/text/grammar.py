"""Composes grammars from parts and checks them before a request is queued.

llguidance does the checks. A keyword that it cannot enforce is refused, so that a schema is never followed in part unnoticed.
"""

import re
from collections.abc import Mapping

import msgspec

from runtime.errors import InvalidRequest, NotSupported
from runtime.text.constraint import JsonSchema, Part, Wanted, part_of
from runtime.text.schema_paths import path_of_error

MAX_BYTES = 262_144  # each of a request's sequences carries the text to the engine
# Behind reasoning models write a line end or two.
LEADING_SPACE = "LEADING_SPACE: /[ \\n]{1,4}/"
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_UNSAFE = re.compile(r"[^\w.\-, ]", re.ASCII)


def compose(start: str, parts: Mapping[str, Part]) -> str:
    """Return a grammar. `start` is its Lark text, which names a part as `@name`."""
    whole = [{"lark_grammar": start}, *({"name": name, **part} for name, part in parts.items())]
    return msgspec.json.encode({"grammars": whole}).decode()


def answer_grammar(wanted: Wanted) -> tuple[str, tuple[str, ...]]:
    """Return the grammar of a whole answer, and notes for the `Warning` header on what it does not enforce.

    It takes a millisecond as a rule and a quarter of a second for thousands of alternatives: call it off the event loop.
    Raises InvalidRequest naming the keyword and its path, or NotSupported if llguidance is not installed.
    """
    notes = check_part(wanted)
    return compose("start: @answer", {"answer": part_of(wanted.constraint)}), notes


def check_part(wanted: Wanted) -> tuple[str, ...]:
    """Check one constraint. Returns notes on what it does not enforce. Raises InvalidRequest or NotSupported."""
    constraint = wanted.constraint
    try:
        part = part_of(constraint)
    except InvalidRequest as error:
        raise InvalidRequest(f"{wanted.where}: {error.detail}", param=wanted.param) from error
    is_error, messages = validate(part, wanted.param)
    if not is_error:
        return (f"{_UNSAFE.sub('', wanted.where)} is not enforced in full: {_safe(messages)}",) if messages else ()
    place, message = "", messages[0]
    if isinstance(constraint, JsonSchema):
        place = path_of_error(constraint, message, lambda schema: validate(part_of(schema), wanted.param))
    found = _UNIMPLEMENTED.search(message)
    text = f"the keyword {found[1]} cannot be enforced" if found else _first_lines(message)
    raise InvalidRequest(f"{wanted.where}{place}: {text}", param=wanted.param)


def validate(part: Part, param: str) -> tuple[bool, list[str]]:
    """Return whether a part is refused, and the error or the warnings."""
    text = msgspec.json.encode({"grammars": [part]}).decode()
    if len(text) > MAX_BYTES:
        raise InvalidRequest(
            f"{param} makes a grammar of {len(text)} bytes; the limit is {MAX_BYTES}",
            param=param,
            limit=MAX_BYTES,
            value=len(text),
        )
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise NotSupported(
            f"{param} needs the package llguidance, which is not installed on this server", param=param
        ) from error
    return LLMatcher.validate_grammar_with_warnings(text)


def _first_lines(message: str) -> str:
    """Return the library's message without the listing of the grammar that may follow it."""
    return message.partition("\n   1 | ")[0].strip()


def _safe(messages: list[str]) -> str:
    return ", ".join(_UNSAFE.sub("", message)[:120] for message in messages[:8])
