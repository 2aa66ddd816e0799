"""Decides which arguments of tagged calls are raw text. The parser and the grammars of calls must agree on that."""

from collections.abc import Mapping


def is_raw_text(schema: object) -> bool:
    """Whether a value of this schema is the text itself. Any other value is written as JSON."""
    if not isinstance(schema, Mapping):
        return True
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref")):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    constants = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return all(isinstance(constant, str) for constant in constants)
