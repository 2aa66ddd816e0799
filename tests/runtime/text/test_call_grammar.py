"""Grammars of tool calls in every family's layout: what they accept, and that each text drawn from them is read as valid calls."""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import AddedToken, Tokenizer

from runtime.errors import InvalidRequest
from runtime.generation.format_parser import FormatParser, ParserOptions
from runtime.generation.parts import Text, ToolCall
from runtime.text import output_format as formats
from runtime.text.call_grammar import Function
from runtime.text.call_layout import LAYOUTS, Arguments
from runtime.text.chat_grammar import Calls, ChatGrammar, chat_grammar, layout_of, marker_texts
from runtime.text.constraint import JsonSchema, Wanted
from runtime.text.output_format import ALL_FORMATS, GENERIC, OutputFormat
from runtime.types import Grammar
from tests.support import tokenizers as tiny
from tests.support.grammars import GrammarReader

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "unit": {"enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "place": {"$ref": "#/$defs/place"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]}},
}
NOW: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": WEATHER, "now": NOW}
FUNCTIONS = (Function("weather", WEATHER, False, "tools[0]"), Function("now", NOW, False, "tools[1]"))
WITH_CALLS = {found.name: found for found in (*ALL_FORMATS, GENERIC) if found.calls is not None}

_JSON = '{"city": "Paris", "days": 3}'
_R1 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"
_KIMI = "<|tool_call_begin|>functions.%s:%d<|tool_call_argument_begin|>%s<|tool_call_end|>"
_LIST = f'[{{"name": "weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]'
# A call of weather and one of now, or weather alone where the family writes one call only.
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {_JSON}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
    "qwen_xml": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3\n</arg_value>\n</tool_call>\n"
    "<tool_call>now\n</tool_call>",
    "llama_json": f'{{"name": "weather", "parameters": {_JSON}}}',
    "llama_python": '[weather(city="Paris", days=3), now()]',
    "mistral": f"[TOOL_CALLS]weather[ARGS]{_JSON}[TOOL_CALLS]now[ARGS]{{}}",
    "mistral_list": f"[TOOL_CALLS]{_LIST}",
    "deepseek": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{_JSON}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_r1": f"<｜tool▁calls▁begin｜>{_R1 % ('weather', _JSON)}\n{_R1 % ('now', '{}')}<｜tool▁calls▁end｜>",
    "granite": f"<|tool_call|>{_LIST}",
    "phi": f"<|tool_call|>{_LIST}<|/tool_call|>",
    "kimi": f"<|tool_calls_section_begin|>{_KIMI % ('weather', 0, _JSON)}{_KIMI % ('now', 1, '{}')}<|tool_calls_section_end|>",
    "gemma": '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|><|tool_call>call:now{}<tool_call|>',
    "harmony": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{_JSON}",
    "generic": f'[{{"name": "weather", "parameters": {_JSON}}}, {{"name": "now", "parameters": {{}}}}]',
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, GrammarReader]:
    """By whether the markers of all families are tokens of the vocabulary. One of them is `<|end|>`, so that another token is the end."""
    folder: Path = tiny.byte_level(tmp_path_factory.mktemp("plain"))
    marked = tmp_path_factory.mktemp("marked")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    markers = sorted({marker for found in ALL_FORMATS for marker in found.markers if _is_token(marker)})
    tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    tokenizer.save(str(marked / "tokenizer.json"))
    return {False: GrammarReader(folder, eos=2), True: GrammarReader(marked, eos=2)}


def _is_token(marker: str) -> bool:
    return (marker[:1], marker[-1:]) in (("<", ">"), ("[", "]")) and marker.count("<") + marker.count("[") == 1


def grammar(chat: ChatGrammar, output_format: OutputFormat, reader: GrammarReader) -> Grammar:
    ids = {text: reader.tokenizer.token_to_id(text) for text in marker_texts(output_format)}
    known = {text: token_id for text, token_id in ids.items() if token_id is not None}
    return Grammar(chat_grammar(chat, output_format, known, after_reasoning=False)[0])


def read(
    output_format: OutputFormat, text: str, schemas: Mapping[str, Mapping[str, Any]]
) -> tuple[str, list[ToolCall]]:
    """Return the text beside the calls, and the calls."""
    parser = FormatParser(output_format, ParserOptions(tools=schemas, whole_calls=True))
    parts = [*(parser.push(text) if text else ()), *parser.flush()]
    return "".join(part.text for part in parts if isinstance(part, Text)), [p for p in parts if isinstance(p, ToolCall)]


def test_call_grammar_has_a_layout_of_every_family() -> None:
    assert set(LAYOUTS) | {"generic"} == set(WITH_CALLS) == set(WRITTEN)


@pytest.mark.parametrize("name", WITH_CALLS)
@pytest.mark.parametrize("marked", [False, True])
def test_call_grammar_accepts_the_familys_own_text(readers: dict[bool, GrammarReader], name: str, marked: bool) -> None:
    output_format, reader = WITH_CALLS[name], readers[marked]
    several = grammar(ChatGrammar(Calls.REQUIRED, FUNCTIONS), output_format, reader)
    assert reader.accepts(several, WRITTEN[name])
    assert not reader.accepts(several, WRITTEN[name].replace("weather", "other"))
    assert not reader.accepts(several, WRITTEN[name].replace("3", "x"))
    assert not reader.accepts(several, "I look.")
    assert not reader.accepts(several, "")
    answer, calls = read(output_format, WRITTEN[name], SCHEMAS)
    assert answer == ""
    expected = [("weather", {"city": "Paris", "days": 3}), ("now", {})][: 2 if layout_of(output_format).several else 1]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == expected


@pytest.mark.parametrize("name", [name for name in WITH_CALLS if layout_of(WITH_CALLS[name]).several])
def test_call_grammar_without_parallel_calls_allows_one(readers: dict[bool, GrammarReader], name: str) -> None:
    output_format, reader = WITH_CALLS[name], readers[True]
    one = grammar(ChatGrammar(Calls.REQUIRED, FUNCTIONS, several=False), output_format, reader)
    assert not reader.accepts(one, WRITTEN[name])
    for seed in range(5):
        text = reader.random_text(one, random.Random(seed), most=1500)
        if text is not None:
            assert len(read(output_format, text, SCHEMAS)[1]) == 1


@pytest.mark.parametrize("name", WITH_CALLS)
def test_call_grammar_draws_texts_that_are_read_as_valid_calls(readers: dict[bool, GrammarReader], name: str) -> None:
    output_format, reader = WITH_CALLS[name], readers[True]
    made = grammar(ChatGrammar(Calls.REQUIRED, FUNCTIONS), output_format, reader)
    finished = 0
    for seed in range(40):
        text = reader.random_text(made, random.Random(seed))
        if text is None:
            continue
        answer, calls = read(output_format, text, SCHEMAS)
        assert (answer.strip(), bool(calls)) == ("", True), text
        for call in calls:
            assert call.name is not None
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        finished += 1
    assert finished >= 10


@pytest.mark.parametrize("name", [name for name in WITH_CALLS if name != "generic"])
@pytest.mark.parametrize("marked", [False, True])
def test_strict_functions_leave_text_free_and_calls_valid(
    readers: dict[bool, GrammarReader], name: str, marked: bool
) -> None:
    output_format, reader = WITH_CALLS[name], readers[marked]
    strict = tuple(replace(function, strict=True) for function in FUNCTIONS)
    made = grammar(ChatGrammar(Calls.ALLOWED, strict), output_format, reader)
    opening = layout_of(output_format).answer_open
    assert reader.accepts(made, f"{opening}It rains <a> b.\n")
    assert reader.accepts(made, WRITTEN[name])
    assert not reader.accepts(made, WRITTEN[name].replace("weather", "other"))
    if output_format.triggers and not opening:
        assert reader.accepts(made, "I look. " + WRITTEN[name] + "\nDone.")
        assert not reader.accepts(made, "I look. " + WRITTEN[name].replace("3", "x"))


@pytest.mark.parametrize("name", [name for name in WITH_CALLS if name not in ("llama_json", "generic")])
def test_call_grammar_answer_is_a_call_or_matches_the_schema(readers: dict[bool, GrammarReader], name: str) -> None:
    output_format, reader = WITH_CALLS[name], readers[True]
    wanted = Wanted(JsonSchema({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}), "f")
    made = grammar(ChatGrammar(Calls.ALLOWED, FUNCTIONS, wanted=wanted), output_format, reader)
    opening = layout_of(output_format).answer_open
    assert reader.accepts(made, f'{opening}{{"a": null}}')
    assert reader.accepts(made, WRITTEN[name])
    assert not reader.accepts(made, f"{opening}It rains.")


def test_call_grammar_refuses_a_schema_beside_calls_without_a_mark() -> None:
    wanted = Wanted(JsonSchema({"type": "object"}), "response_format")
    with pytest.raises(InvalidRequest, match="response_format and tools cannot be combined"):
        chat_grammar(
            ChatGrammar(Calls.ALLOWED, FUNCTIONS, wanted=wanted), formats.LLAMA_JSON, {}, after_reasoning=False
        )


def test_harmony_may_reason_first(readers: dict[bool, GrammarReader]) -> None:
    reader = readers[True]
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    wanted = Wanted(JsonSchema({"type": "object"}), "f")
    answer = grammar(ChatGrammar(wanted=wanted), formats.HARMONY, reader)
    assert reader.accepts(answer, thought + "<|channel|>final<|message|>{}")
    assert not reader.accepts(answer, thought + "{}")
    calls = grammar(ChatGrammar(Calls.REQUIRED, FUNCTIONS), formats.HARMONY, reader)
    assert reader.accepts(calls, thought + WRITTEN["harmony"])


@pytest.mark.parametrize(
    ("name", "schema", "path"),
    [
        ("hermes", {"type": "array", "uniqueItems": True}, 'tools[0].properties.a: the keyword "uniqueItems"'),
        ("qwen_xml", {"type": "string", "pattern": "a+"}, 'tools[0].properties.a: the keyword "pattern"'),
        ("gemma", {"type": "integer", "minimum": 3}, 'tools[0].properties.a: the keyword "minimum"'),
        ("llama_python", {"items": {"maxLength": 3}}, 'tools[0].properties.a.items: the keyword "maxLength"'),
    ],
)
def test_call_grammar_refuses_a_strict_function_that_cannot_be_enforced(
    name: str, schema: dict[str, Any], path: str
) -> None:
    parameters = {"type": "object", "properties": {"a": schema}}
    chat = ChatGrammar(Calls.REQUIRED, (Function("f", parameters, True, "tools[0]"),))
    with pytest.raises(InvalidRequest) as caught:
        chat_grammar(chat, WITH_CALLS[name], {}, after_reasoning=False)
    assert (caught.value.param, caught.value.detail.startswith(path)) == ("tools", True), caught.value.detail
    lenient = ChatGrammar(Calls.REQUIRED, (Function("f", parameters, False, "tools[0]"),))
    _, notes = chat_grammar(lenient, WITH_CALLS[name], {}, after_reasoning=False)
    assert len(notes) == 1
    assert "is not enforced in full: " in notes[0]


def test_names_and_keys_are_written_as_the_notation_needs_them(readers: dict[bool, GrammarReader]) -> None:
    reader = readers[False]
    odd = Function('a"b', {"properties": {'k"': {"type": "null"}}, "required": ['k"']}, False, "tools[0]")
    made = grammar(ChatGrammar(Calls.REQUIRED, (odd,), several=False), formats.HERMES, reader)
    assert reader.accepts(made, '<tool_call>\n{"name": "a\\"b", "arguments": {"k\\"": null}}\n</tool_call>')


def test_nested_values_in_python_and_quoted_notation(readers: dict[bool, GrammarReader]) -> None:
    reader = readers[True]
    tree = {
        "type": "object",
        "properties": {"v": {"$ref": "#/$defs/t"}, "any": {}},
        "required": ["v"],
        "$defs": {
            "t": {
                "type": ["object", "null"],
                "properties": {"next": {"$ref": "#/$defs/t"}, "ok": {"const": True}},
                "required": ["next"],
            }
        },
    }
    chat = ChatGrammar(Calls.REQUIRED, (Function("f", tree, False, "tools[0]"),), several=False)
    python = grammar(chat, formats.LLAMA_PYTHON, reader)
    assert reader.accepts(python, '[f(v={"next": {"next": None, "ok": True}}, any=[1.5, "x", {"a": False}])]')
    assert not reader.accepts(python, '[f(v={"next": null})]')
    quoted = grammar(chat, formats.GEMMA, reader)
    assert reader.accepts(quoted, '<|tool_call>call:f{v:{next:null},any:[1.5,<|"|>x<|"|>,{a:false}]}<tool_call|>')
    assert {Arguments.PYTHON, Arguments.QUOTED} <= {layout.arguments for layout in LAYOUTS.values()}
