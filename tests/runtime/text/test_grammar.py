"""Grammars of answers: what is enforced, what is refused and where, and that every finished text matches."""

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidRequest
from runtime.text.chat_grammar import ChatGrammar, chat_grammar
from runtime.text.constraint import (
    JSON_OBJECT,
    Choice,
    Constraint,
    GrammarText,
    JsonSchema,
    Regex,
    Wanted,
    schema_of,
)
from runtime.text.gbnf import MAX_CHARS
from runtime.text.grammar import MAX_BYTES, answer_grammar
from runtime.types import Grammar
from tests.support import tokenizers as tiny
from tests.support.grammars import GrammarReader


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> GrammarReader:
    return GrammarReader(tiny.byte_level(tmp_path_factory.mktemp("tokenizer")))


def grammar(constraint: Constraint) -> Grammar:
    return Grammar(answer_grammar(Wanted(constraint, "field"))[0])


def member(**schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


ENFORCED: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("type", member(type="integer"), {"a": 1}, {"a": "1"}),
    ("required", member(type="integer"), {"a": 1}, {}),
    ("enum", member(enum=["x", 2, None]), {"a": None}, {"a": "y"}),
    ("const", member(const={"k": [1]}), {"a": {"k": [1]}}, {"a": {"k": [2]}}),
    ("minimum", member(type="integer", minimum=3), {"a": 3}, {"a": 2}),
    ("maximum", member(type="number", maximum=1.5), {"a": 1.5}, {"a": 1.6}),
    ("multipleOf", member(type="integer", multipleOf=5), {"a": 10}, {"a": 11}),
    ("minLength", member(type="string", minLength=2), {"a": "xy"}, {"a": "x"}),
    ("maxLength", member(type="string", maxLength=2), {"a": "xy"}, {"a": "xyz"}),
    ("pattern", member(type="string", pattern="^[a-c]+$"), {"a": "abc"}, {"a": "abd"}),
    ("pattern and maxLength", member(type="string", pattern="^a+$", maxLength=2), {"a": "aa"}, {"a": "aaa"}),
    ("format", member(type="string", format="date"), {"a": "2026-11-30"}, {"a": "30.11.2026"}),
    ("minItems", member(type="array", items={"type": "integer"}, minItems=1), {"a": [1]}, {"a": []}),
    ("maxItems", member(type="array", items={"type": "integer"}, maxItems=1), {"a": [1]}, {"a": [1, 2]}),
    ("prefixItems", member(prefixItems=[{"type": "integer"}], items=False), {"a": [1]}, {"a": ["x"]}),
    ("additionalProperties", {**member(type="null"), "additionalProperties": False}, {"a": None}, {"a": None, "b": 1}),
    ("patternProperties", {"type": "object", "patternProperties": {"^x": {"type": "null"}}}, {"x": None}, {"x": 1}),
    ("maxProperties", {"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    ("anyOf", member(anyOf=[{"type": "string"}, {"type": "null"}]), {"a": None}, {"a": 1}),
    ("oneOf without overlap", member(oneOf=[{"type": "string"}, {"type": "null"}]), {"a": "x"}, {"a": 1}),
    ("allOf", {"allOf": [member(type="integer"), {"required": ["a"]}]}, {"a": 1}, {"a": "x"}),
    ("$ref", {**member(**{"$ref": "#/$defs/n"}), "$defs": {"n": {"type": "null"}}}, {"a": None}, {"a": 1}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("uniqueItems", member(type="array", uniqueItems=True), ".properties.a"),
    ("not", member(**{"not": {"type": "string"}}), ".properties.a"),
    ("contains", member(type="array", contains={"type": "string"}), ".properties.a"),
    ("dependentRequired", {"type": "object", "dependentRequired": {"a": ["b"]}}, ""),
    ("propertyNames", {"type": "object", "propertyNames": {"pattern": "a"}}, ""),
    ("if", {"anyOf": [{"type": "null"}, {"if": {"type": "string"}}]}, ".anyOf[1]"),
    ("Unknown format", {"$defs": {"n": {"type": "string", "format": "x"}}, "$ref": "#/$defs/n"}, ".$defs.n"),
    ("oneOf", member(oneOf=[{"type": "string"}, {"type": "string", "minLength": 2}]), ".properties.a"),
    ("does not exist", member(**{"$ref": "#/$defs/n"}), ".properties.a"),
    ("look-around", member(items={"type": "string", "pattern": "(?=a)b"}, type="array"), ".properties.a.items"),
    ("Invalid type", member(type="strin"), ".properties.a"),
    ("Unsatisfiable", member(type="integer", minimum=5, maximum=3), ""),
]


@pytest.mark.parametrize(("schema", "good", "bad"), [row[1:] for row in ENFORCED], ids=[row[0] for row in ENFORCED])
def test_grammar_enforces_a_keyword(reader: GrammarReader, schema: dict[str, Any], good: Any, bad: Any) -> None:
    made = grammar(JsonSchema(schema))
    assert reader.accepts(made, json.dumps(good))
    assert not reader.accepts(made, json.dumps(bad))


@pytest.mark.parametrize(("text", "schema", "path"), REFUSED, ids=[row[0] for row in REFUSED])
def test_grammar_refuses_what_it_cannot_enforce_with_its_path(text: str, schema: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar(JsonSchema(schema))
    assert caught.value.param == "field"
    assert caught.value.detail.startswith(f"field{path}: ")
    assert text in caught.value.detail


@pytest.mark.parametrize("name", ["uniqueItems", "not", "propertyNames", "if", "Unknown format", "oneOf"])
def test_grammar_follows_a_lenient_schema_with_a_note(reader: GrammarReader, name: str) -> None:
    schema = next(schema for text, schema, _ in REFUSED if text == name)
    text, [note] = answer_grammar(Wanted(JsonSchema(schema, lenient=True), "field"))
    assert note.startswith("field is not enforced in full: ")
    assert not set(note) & set('"\\\r\n')
    assert reader.random_text(Grammar(text), random.Random(1), most=2000) is not None


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (JSON_OBJECT, ['{"a": [1, {}]}', '{\n  "a": 1\n}', "{}"], ["[]", "1", '{"a": 1', ' {"a": 1}']),
        (JSON_OBJECT, ['{"a":1}'], ['{"a":\n\n\n1}', '{"a":    1}']),
        (JsonSchema({"type": "object"}, whitespace=""), ['{"a":1}'], ['{"a": 1}']),
        (JsonSchema({}, whitespace="[ ]*"), ["[1,   2]"], ["[1,\n2]"]),
        (Regex(r"\d{2}/[a-z]+"), ["42/ab"], ["4/ab", "42/"]),
        (Regex("a\nb"), ["a\nb"], ["a b"]),
        (Regex(r"[\p{L}]{2,3}"), ["äé"], ["a1"]),
        (Choice(("yes", 'no "way"\\', "é\n")), ["yes", 'no "way"\\', "é\n"], ["no", "ye"]),
        (GrammarText('root ::= "a" b\nb ::= [0-9]+'), ["a12"], ["a", "12"]),
        (GrammarText('start: "a" B\nB: /[0-9]+/'), ["a12"], ["a", "12"]),
    ],
)
def test_grammar_enforces_each_kind_of_constraint(
    reader: GrammarReader, constraint: Constraint, good: list[str], bad: list[str]
) -> None:
    made = grammar(constraint)
    assert [reader.accepts(made, text) for text in good] == [True] * len(good)
    assert [reader.accepts(made, text) for text in bad] == [False] * len(bad)


def test_grammar_behind_reasoning_may_begin_with_line_ends(reader: GrammarReader) -> None:
    made = Grammar(
        chat_grammar(ChatGrammar(wanted=Wanted(Choice(("yes",)), "field")), None, {}, after_reasoning=True)[0]
    )
    assert reader.accepts(made, "\n\nyes")
    assert reader.accepts(made, "yes")
    assert not reader.accepts(made, "\n\n\n\n\nyes")


@pytest.mark.parametrize(
    ("constraint", "text"),
    [
        (Regex("("), "unclosed group"),
        (Regex("(?=a)b"), "look-around"),
        (GrammarText("start: x"), 'unknown name: "x"'),
        (GrammarText("root ::= foo"), "foo"),
        (GrammarText("root ::= ("), "syntax error"),
        (GrammarText("root ::= " + "(" * 5000), "nested too deeply"),
        (GrammarText("root ::= " + "a" * MAX_CHARS), f"the limit is {MAX_CHARS}"),
        (GrammarText("hello"), "Expected token ':'"),
        (Choice(("x" * MAX_BYTES,)), f"the limit is {MAX_BYTES}"),
    ],
)
def test_grammar_refuses_a_wrong_constraint_by_the_fields_name(constraint: Constraint, text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(text)) as caught:
        grammar(constraint)
    assert (caught.value.param, "field" in caught.value.detail) == ("field", True)


def test_grammar_refuses_a_deeply_nested_schema() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        schema = member(**schema)
    with pytest.raises(InvalidRequest, match="recursion limit"):
        grammar(JsonSchema(schema))


def test_schema_of_reads_text_and_refuses_other_values() -> None:
    assert schema_of('{"type": "null"}', "f") == {"type": "null"}
    assert schema_of(True, "f") == {}
    for value in ("{", "1", [1], None, "[" * 100_000):
        with pytest.raises(InvalidRequest, match="f "):
            schema_of(value, "f")


_scalars: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 99),
    ),
    st.just({"type": "number"}),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.sampled_from(
        [{"type": "string", "pattern": "^[a-f]{1,4}$"}, {"type": "string", "format": "date"}, {"type": "string"}]
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(st.integers(-9, 9) | st.text('ab"\\\n', max_size=3), min_size=1, max_size=4),
    ),
)


def _nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(
            lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(
            lambda members, needed, closed: {
                "type": "object",
                "properties": members,
                "required": sorted(members)[:needed],
                **({"additionalProperties": False} if closed else {}),
            },
            st.dictionaries(st.text('abc"é', min_size=1, max_size=3), inner, max_size=3),
            st.integers(0, 3),
            st.booleans(),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    )


@settings(max_examples=150, deadline=None)
@given(st.recursive(_scalars, _nested, max_leaves=6), st.integers(0, 2**32))
def test_grammar_finishes_valid_documents(reader: GrammarReader, schema: dict[str, Any], seed: int) -> None:
    try:
        made = grammar(JsonSchema(schema))
    except InvalidRequest:
        assume(False)
    text = reader.random_text(made, random.Random(seed))
    if text is not None:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_random_texts_finish_as_a_rule(reader: GrammarReader) -> None:
    schema = member(type="array", items=member(type="string", maxLength=5), minItems=1, maxItems=3)
    made = grammar(JsonSchema({**schema, "additionalProperties": False}))
    finished = [reader.random_text(made, random.Random(seed)) for seed in range(20)]
    assert sum(text is not None for text in finished) > 10
