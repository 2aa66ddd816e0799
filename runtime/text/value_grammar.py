"""Writes the grammar of values in notations other than JSON, from the part of JSON schema that they can follow."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.text.constraint import quoted
from runtime.text.lark_rules import Rules

# Keywords that a value must satisfy and that these rules do not follow. Others are followed, or say nothing about the value.
_UNFOLLOWED = frozenset(
    ("allOf", "not", "if", "then", "else", "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf", "uniqueItems", "contains", "prefixItems", "patternProperties", "propertyNames", "minProperties",
     "maxProperties", "dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems")
)  # fmt: skip
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_STRING = r'/"([^"\\\x00-\x1f\x7f]|\\["\\nrt])*"/'
_INTEGER = "/-?(0|[1-9][0-9]*)/"
_NUMBER = r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/"
_NAME = "/[A-Za-z_][A-Za-z0-9_]*/"
_MOST_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Notation:
    """`quote`: both ends of a string without escapes; empty = strings as in JSON. `bare_keys`: keys are written without quotes."""

    true: str = "true"
    false: str = "false"
    null: str = "null"
    comma: str = ", "
    colon: str = ": "
    quote: str = ""
    bare_keys: bool = False


PYTHON = Notation("True", "False", "None")


class ValueGrammar:
    """Adds rules for the values of one schema. `unenforced`: keywords that it does not follow, with their paths."""

    def __init__(self, rules: Rules, notation: Notation, root: Mapping[str, Any]) -> None:
        self.unenforced: list[tuple[str, str]] = []
        self._rules = rules
        self._notation = notation
        self._root = root
        self._by_reference: dict[str, str] = {}
        self._any: str | None = None
        self._depth = 0

    def value(self, schema: object, path: str = "") -> str:
        """Return an expression for a value of `schema`."""
        if not isinstance(schema, Mapping):
            return self._any_value()
        self._note_keywords(schema, path)
        self._depth += 1
        try:
            return self._value(schema, path) if self._depth < _MOST_DEPTH else self._any_value()
        finally:
            self._depth -= 1

    def keywords(self, schema: Mapping[str, Any]) -> str:
        """Return an expression for keyword arguments, `name=value`, with the properties of `schema`."""
        self._note_keywords(schema, "")
        if not schema.get("properties"):
            return self._rules.literal("")
        return self.members(schema, "", lambda name: self._rules.literal(f"{name}="))

    def members(self, schema: Mapping[str, Any], path: str, key: Callable[[str], str]) -> str:
        """Return an expression for the members of an object; `key` returns the expression before a member's value."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            others = schema.get("additionalProperties", True)
            if others is False:
                return self._rules.literal("")
            name = _NAME if self._notation.bare_keys else _STRING
            member = f"{name} {self._rules.literal(self._notation.colon)} {self.value(others, path)}"
            return self._listed(member)
        required = schema.get("required") or ()
        return self._rules.optional_members(
            [
                (f"{key(name)} {self.value(item, f'{path}.properties.{name}')}", name in required)
                for name, item in properties.items()
            ],
            self._notation.comma,
        )

    def constant(self, value: object) -> str:
        """Return a constant as it is written."""
        notation = self._notation
        match value:
            case None:
                return notation.null
            case bool():
                return notation.true if value else notation.false
            case str():
                return f"{notation.quote}{value}{notation.quote}" if notation.quote else quoted(value)
            case list():
                return "[" + notation.comma.join(self.constant(item) for item in value) + "]"
            case dict():
                pairs = [f"{self._key_text(key)}{notation.colon}{self.constant(item)}" for key, item in value.items()]
                return "{" + notation.comma.join(pairs) + "}"
        return str(value)

    def _value(self, schema: Mapping[str, Any], path: str) -> str:
        match schema:
            case {"$ref": str(reference)}:
                return self._reference(reference, path)
            case {"const": constant}:
                return self._rules.literal(self.constant(constant))
            case {"enum": list(values)}:
                return self._either([self._rules.literal(self.constant(value)) for value in values])
            case {"anyOf": list(options)} | {"oneOf": list(options)}:
                key = "anyOf" if "anyOf" in schema else "oneOf"
                return self._either([self.value(item, f"{path}.{key}[{i}]") for i, item in enumerate(options)])
        kinds = schema.get("type")
        if kinds is None:
            kinds = "object" if "properties" in schema else "array" if "items" in schema else None
        if kinds is None:
            return self._any_value()
        return self._either(
            [self._of_type(kind, schema, path) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
        )

    def _of_type(self, kind: str, schema: Mapping[str, Any], path: str) -> str:
        rules, notation = self._rules, self._notation
        match kind:
            case "object":
                members = self.members(
                    schema, path, lambda name: rules.literal(f"{self._key_text(name)}{notation.colon}")
                )
                return f'"{{" {members} "}}"'
            case "array":
                return self._array(schema, path)
            case "string":
                return (
                    f"{rules.literal(notation.quote)} {rules.text_before(notation.quote)}"
                    if notation.quote
                    else _STRING
                )
            case "integer":
                return _INTEGER
            case "number":
                return _NUMBER
            case "boolean":
                return self._either([rules.literal(notation.true), rules.literal(notation.false)])
            case "null":
                return rules.literal(notation.null)
        return self._any_value()

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        item = self.value(schema.get("items", True), f"{path}.items")
        least, most = schema.get("minItems") or 0, schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        more = f"({self._rules.literal(self._notation.comma)} {item})"
        repeated = f"{item} {more}{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        return f'"[" {repeated} "]"' if least else f'"[" ({repeated})? "]"'

    def _reference(self, reference: str, path: str) -> str:
        known = self._by_reference.get(reference)
        if known is not None:
            return known
        self._by_reference[reference] = name = self._rules.new_name()
        return self._rules.add(self.value(self._resolve(reference), path), name)

    def _resolve(self, reference: str) -> object:
        found: object = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        return found

    def _any_value(self) -> str:
        """Return the rule of a value of any type."""
        if self._any is None:
            self._any = name = self._rules.new_name()
            kinds = [self._of_type(kind, {}, "") for kind in _TYPES if kind not in ("object", "array", "integer")]
            key = _NAME if self._notation.bare_keys else _STRING
            pair = f"{key} {self._rules.literal(self._notation.colon)} {name}"
            nested = [f'"[" {self._listed(name)} "]"', f'"{{" {self._listed(pair)} "}}"']
            self._rules.add(" | ".join([*kinds, *nested]), name)
        return self._any

    def _listed(self, member: str) -> str:
        return f"({member} ({self._rules.literal(self._notation.comma)} {member})*)?"

    def _either(self, options: Sequence[str]) -> str:
        return options[0] if len(options) == 1 else self._rules.add(" | ".join(options))

    def _key_text(self, name: str) -> str:
        return name if self._notation.bare_keys else quoted(name)

    def _note_keywords(self, schema: Mapping[str, Any], path: str) -> None:
        self.unenforced += [(key, path) for key in schema if key in _UNFOLLOWED]
