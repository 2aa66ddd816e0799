"""Reads what a request wants its answer to match: OpenAI's `response_format`, vLLM's and llama.cpp's fields."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from runtime.api.openai.types import Shared
from runtime.errors import InvalidRequest, NotSupported
from runtime.text.constraint import JSON_OBJECT, Choice, Constraint, GrammarText, JsonSchema, Regex, Wanted, schema_of

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_FORMAT_FIELDS = frozenset({"type", "json_schema", "schema", "value"})
_JSON_SCHEMA_FIELDS = frozenset({"name", "description", "schema", "strict"})
_ALIASES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}


def wanted_of(body: Shared) -> Wanted | None:
    """Return the one constraint of the request, or None. Raises InvalidRequest or NotSupported naming the field."""
    found = [*_response_format(body.response_format), *_structured_outputs(body.structured_outputs)]
    for name, kind in _ALIASES.items():
        value = getattr(body, name)
        if value is not None:
            options = {"whitespace_pattern": body.guided_whitespace_pattern}
            found.append(Wanted(_constraint(kind, value, name, options), name))
    if len(found) > 1:
        names = " and ".join(wanted.param for wanted in found)
        raise InvalidRequest(f"{names} exclude each other: send one of them", param=found[1].param)
    return found[0] if found else None


def _response_format(given: Any) -> Iterator[Wanted]:
    param = "response_format"
    given = _decoded(given, param)
    match given:
        case None | {"type": "text"}:
            return
        case {"type": "json_schema", "json_schema": {"schema": schema, **rest}}:
            path = "response_format.json_schema.schema"
            # OpenAI's subset of JSON schema is enforced where `strict` is true. Elsewhere the schema is a best effort.
            constraint = JsonSchema(schema_of(schema, path), lenient=rest.get("strict") is not True)
            yield Wanted(constraint, param, path)
        case {"type": "json_object" | "json" | "json_schema", "value": schema}:  # TGI's form
            yield Wanted(JsonSchema(schema_of(schema, "response_format.value")), param, "response_format.value")
        case {"type": "json_object" | "json_schema", "schema": dict(schema)}:  # llama.cpp's form
            yield Wanted(JsonSchema(schema_of(schema, "response_format.schema")), param, "response_format.schema")
        case {"type": "regex", "value": str(pattern)}:
            yield Wanted(Regex(pattern), param)
        case {"type": "json_object"}:
            yield Wanted(JSON_OBJECT, param)
        case {"type": "json_schema"}:
            raise InvalidRequest("response_format.json_schema has no schema", param=param)
        case {"type": "structural_tag"}:
            raise NotSupported("response_format of type structural_tag is not supported", param=param)
        case _:
            kind = given.get("type") if isinstance(given, dict) else given
            raise InvalidRequest(
                f"response_format must have the type text, json_object or json_schema, got {kind!r}", param=param
            )


def unknown_in_format(given: Any) -> Iterator[str]:
    """Yield the paths of fields inside a `response_format` that say nothing about the answer here and are not null."""
    if not isinstance(given, dict):
        return
    yield from (f"response_format.{name}" for name in given if name not in _FORMAT_FIELDS and given[name] is not None)
    inner = given.get("json_schema")
    if isinstance(inner, dict):
        names = (name for name in inner if name not in _JSON_SCHEMA_FIELDS and inner[name] is not None)
        yield from (f"response_format.json_schema.{name}" for name in names)


def _structured_outputs(given: Any) -> Iterator[Wanted]:
    param = "structured_outputs"
    given = _decoded(given, param)
    if given is None:
        return
    if not isinstance(given, dict):
        raise InvalidRequest(f"structured_outputs must be an object with one of {', '.join(_KINDS)}", param=param)
    if given.get("structural_tag") is not None:
        raise NotSupported("structured_outputs.structural_tag is not supported", param=param)
    unknown = next((key for key in given if key not in (*_KINDS, *_OPTIONS, "structural_tag")), None)
    if unknown is not None:
        raise InvalidRequest(f"structured_outputs.{unknown} does not exist", param=param)
    named = [kind for kind in _KINDS if given.get(kind) not in (None, False)]
    if len(named) > 1:
        raise InvalidRequest(
            f"You can only use one kind of structured outputs constraint, got {' and '.join(named)}", param=param
        )
    for kind in named:
        path = f"{param}.{kind}"
        yield Wanted(_constraint(kind, given[kind], path, given), param, path)


def _constraint(kind: str, value: Any, where: str, options: Mapping[str, Any]) -> Constraint:
    param = where.partition(".")[0]
    match kind, value:
        case "json_object", True:
            return JSON_OBJECT
        case "json", _:
            schema = schema_of(value, where)
            if options.get("disable_additional_properties") is True:
                schema = _closed(schema)
            compact = options.get("disable_any_whitespace") is True
            return JsonSchema(schema, whitespace="" if compact else options.get("whitespace_pattern"))
        case "regex" | "grammar", str():
            return Regex(value) if kind == "regex" else GrammarText(value)
        case "choice", _:
            choices = _decoded(value, where)
            if isinstance(choices, list) and choices and all(isinstance(item, str) for item in choices):
                return Choice(tuple(choices))
            raise InvalidRequest(f"{where} must be a list of at least 1 string", param=param)
    raise InvalidRequest(
        f"{where} must be {'true or false' if kind == 'json_object' else 'a string'}, got {type(value).__name__}",
        param=param,
    )


def _decoded(value: Any, where: str) -> Any:
    """Decode a value that came as JSON in a string, as in parameters of the Open Inference Protocol."""
    if not isinstance(value, str) or not value.startswith(("{", "[")):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"{where} is not JSON: {error}", param=where.partition(".")[0]) from error


def _closed(schema: Any) -> Any:
    """Return the schema without additional properties where it says nothing about them."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: value if key in ("enum", "const", "default", "examples") else _closed(value)
        for key, value in schema.items()
    }
    if "properties" in schema and isinstance(schema["properties"], dict) and "type" in schema:
        closed.setdefault("additionalProperties", False)
    return closed
