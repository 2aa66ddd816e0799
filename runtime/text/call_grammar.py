"""Writes the grammar of tool calls in the layout of a family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from runtime.errors import InvalidRequest
from runtime.text.call_layout import Arguments, CallLayout
from runtime.text.constraint import JsonSchema, Wanted, part_of
from runtime.text.grammar import check_part
from runtime.text.lark_rules import Rules
from runtime.text.tagged_values import is_raw_text
from runtime.text.value_grammar import PYTHON, Notation, ValueGrammar

_INDEX = "/[0-9]{1,3}/"


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called. `where`: the path of its parameters in the request."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    where: str


class CallGrammar:
    """Adds the rules of one request's calls. `notes`: what they do not enforce, for the `Warning` header."""

    def __init__(self, rules: Rules, layout: CallLayout) -> None:
        self.notes: list[str] = []
        self._rules = rules
        self._layout = layout

    def calls(self, functions: Sequence[Function], *, several: bool, without: str = "") -> str:
        """Return an expression for one call, or for one and more. `without`: a text at the beginning that has been written already.

        Raises InvalidRequest naming the keyword of a strict function that cannot be enforced, and its path.
        """
        layout, rules = self._layout, self._rules
        call = rules.add(" | ".join(self._call(function) for function in functions))
        if not layout.open and without:
            first = rules.add(" | ".join(self._call(function, without) for function in functions))
        else:
            first = call
        opening = rules.literal(layout.open.removeprefix(without)) if layout.open else ""
        more = f"({rules.literal(layout.between)} {call})*" if several and layout.several else ""
        return rules.add(f"{opening} {first} {more} {rules.literal(layout.close) if layout.close else ''}".strip())

    def _call(self, function: Function, without: str = "") -> str:
        rules, layout = self._rules, self._layout
        # In JSON the name is part of a string.
        name = msgspec.json.encode(function.name).decode()[1:-1] if '"NAME"' in layout.head else function.name
        before, _, after = layout.head.removeprefix(without).partition("NAME")
        head = rules.literal(before + name + after.partition("INDEX")[0])
        if "INDEX" in after:
            head = f"{head} {_INDEX} {rules.literal(after.partition('INDEX')[2])}"
        return f"{head} {self._arguments(function)} {rules.literal(layout.tail)}"

    def _arguments(self, function: Function) -> str:
        schema = {"type": "object", **function.parameters}
        # The library checks every schema: it tells a JSON schema from any other value.
        self.notes += check_part(Wanted(JsonSchema(schema, lenient=not function.strict), "tools", function.where))
        if self._layout.arguments is Arguments.JSON:
            return self._rules.part(part_of(JsonSchema(schema, lenient=not function.strict)))
        notation = PYTHON
        if self._layout.arguments is Arguments.QUOTED:
            notation = Notation(comma=",", colon=":", quote=self._layout.quote, bare_keys=True)
        values = ValueGrammar(self._rules, notation, schema)
        match self._layout.arguments:
            case Arguments.TAGS:
                written = self._tagged(function, schema)
            case Arguments.PYTHON:
                written = values.keywords(schema)
            case _:
                written = values.value(schema)
        self._report(function, values.unenforced)
        return written

    def _tagged(self, function: Function, schema: Mapping[str, Any]) -> str:
        rules, layout = self._rules, self._layout
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        required = schema.get("required") or ()
        members: list[tuple[str, bool]] = []
        for name, item in (schema.get("properties") or {}).items():
            if is_raw_text(item):
                value = self._raw_text(function, name, item)
            else:
                part = part_of(JsonSchema({**shared, **item}, lenient=not function.strict))
                value = f"{rules.part(part)} {rules.literal(layout.separator + layout.value_end)}"
            element = f"{rules.literal(layout.key.replace('KEY', name))} {value} {rules.literal(layout.separator)}"
            members.append((element, name in required))
        return rules.optional_members(members, "")

    def _raw_text(self, function: Function, name: str, schema: Mapping[str, Any]) -> str:
        """Return an expression for a string's text up to the mark that ends it."""
        rules, layout = self._rules, self._layout
        fixed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if fixed is not None:
            options = " | ".join(rules.literal(str(text)) for text in fixed)
            return f"({options}) {rules.literal(layout.separator + layout.value_end)}"
        limits = [key for key in ("pattern", "format", "minLength", "maxLength") if key in schema]
        self._report(function, [(key, f".properties.{name}") for key in limits])
        return rules.text_before(layout.value_end)

    def _report(self, function: Function, unenforced: Sequence[tuple[str, str]]) -> None:
        if unenforced and function.strict:
            keyword, path = unenforced[0]
            raise InvalidRequest(
                f'{function.where}{path}: the keyword "{keyword}" cannot be enforced in the calls of this model',
                param="tools",
            )
        if unenforced:
            names = ", ".join(sorted({keyword for keyword, _ in unenforced}))
            self.notes.append(f"{function.where} is not enforced in full: {names}")
