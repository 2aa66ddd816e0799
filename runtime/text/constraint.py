"""Defines what an answer must match, in one form for the requests of all APIs, and writes it as a part of a grammar."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from runtime.errors import InvalidRequest
from runtime.text.gbnf import gbnf_to_lark

Part = dict[str, Any]  # a grammar of llguidance: its JSON schema or its Lark text

# Models write one space, or a line with indentation. Without a bound some write white space until they reach max_tokens.
_WHITESPACE = r"[ ]?|\n[ \t]{0,40}"
# What `lenient` leaves out or approximates instead of refusing it.
_LENIENT = {"lenient": True, "coerce_one_of": True}


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """A JSON document. `whitespace`: the pattern of the space between its tokens; "" = none, None = as models write it.

    `lenient`: keywords that cannot be enforced are left out, with a note, instead of refused.
    """

    schema: Mapping[str, Any]
    lenient: bool = False
    whitespace: str | None = None


@dataclass(frozen=True, slots=True)
class Regex:
    """A text that the whole pattern matches."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts."""

    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GrammarText:
    """A context-free grammar: GBNF (rules with `::=` and a root rule) or Lark (with a start rule)."""

    text: str


Constraint = JsonSchema | Regex | Choice | GrammarText
JSON_OBJECT = JsonSchema({"type": "object"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A constraint and the request's field that it comes from, for errors."""

    constraint: Constraint
    param: str
    path: str = field(default="")  # of the schema in the request; empty = `param`

    @property
    def where(self) -> str:
        return self.path or self.param


def part_of(constraint: Constraint) -> Part:
    """Return the constraint as a part of a grammar. Raises InvalidRequest for a GBNF text with a syntax error."""
    match constraint:
        case JsonSchema(schema, lenient, whitespace):
            return {"json_schema": {**schema, "x-guidance": _options(lenient, whitespace)}}
        case Regex(pattern):
            return {"lark_grammar": f"start: /{_escape_slashes(pattern)}/"}
        case Choice(choices):
            return {"lark_grammar": "start: " + " | ".join(quoted(choice) for choice in choices)}
        case GrammarText(text):
            return {"lark_grammar": gbnf_to_lark(text) if "::=" in text else text}


def quoted(text: str) -> str:
    """Return a text as a literal of Lark."""
    return msgspec.json.encode(text).decode()


def _options(lenient: bool, whitespace: str | None) -> dict[str, Any]:
    spacing = {"whitespace_flexible": False} if whitespace == "" else {"whitespace_pattern": whitespace or _WHITESPACE}
    return {**spacing, **(_LENIENT if lenient else {})}


def _escape_slashes(pattern: str) -> str:
    """Return the pattern as it stands between the slashes of Lark, on one line."""
    found: list[str] = []
    escaped = False
    for character in pattern:
        if character == "\n":
            found.append("n" if escaped else "\\n")
        elif character == "/" and not escaped:
            found.append("\\/")
        else:
            found.append(character)
        escaped = character == "\\" and not escaped
    return "".join(found)


def schema_of(value: object, where: str) -> Mapping[str, Any]:
    """Return a schema that came as JSON or as a string of JSON. Raises InvalidRequest naming `where`."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise InvalidRequest(f"{where} is not JSON: {error}", param=where) from error
    if value is True:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be a JSON schema: an object, or its text", param=where)
    return value
