"""Finds the place in a JSON schema that an error is about, since llguidance's messages name only the keyword."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from runtime.text.constraint import JsonSchema

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_MOST_LOOKS = 256  # schemas that are checked on their own
_MOST_DEPTH = 64


def path_of_error(
    constraint: JsonSchema, message: str, validate: Callable[[JsonSchema], tuple[bool, list[str]]]
) -> str:
    """Return the path of the innermost schema that is refused with the same message on its own, as `.properties.a`; "" for the root."""
    shared = {key: constraint.schema[key] for key in ("$defs", "definitions") if key in constraint.schema}
    candidates = sorted(subschemas(constraint.schema), key=lambda found: -found[0].count("."))
    for path, schema in candidates[:_MOST_LOOKS]:
        is_error, found = validate(replace(constraint, schema={**shared, **schema}))
        if is_error and found[0] == message:
            return path
    return ""


def subschemas(schema: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the path and the schema of every schema inside, without the root."""
    if depth >= _MOST_DEPTH:
        return
    for key, value in schema.items():
        inner: list[tuple[str, Any]] = []
        if key in _MAPS and isinstance(value, dict):
            inner = [(f"{path}.{key}.{name}", item) for name, item in value.items()]
        elif key in _LISTS and isinstance(value, list):
            inner = [(f"{path}.{key}[{index}]", item) for index, item in enumerate(value)]
        elif key in _SINGLE:
            inner = [(f"{path}.{key}", value)]
        for place, item in inner:
            if isinstance(item, dict):
                yield place, item
                yield from subschemas(item, place, depth + 1)
