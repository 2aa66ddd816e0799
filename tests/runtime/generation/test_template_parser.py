"""Checkpoints' own response templates, with transformers' ResponseParser as the oracle of where regions begin and end."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import ResponseParser, parse_response

from runtime.generation.format_parser import ParserOptions
from runtime.generation.parts import Part, Reasoning, Text, ToolCall
from runtime.generation.regions import Closed, Event, Opened, Piece, RegionScanner
from runtime.generation.template_parser import TemplateParser
from runtime.text.output_format import CallIds
from runtime.text.response_template import ResponseTemplate, read_response_template
from tests.runtime.generation.outputs import TOOLS
from tests.runtime.generation.test_format_parser import cut, joined
from tests.support.response_templates import ALL_TEMPLATES, HERMES, LEADING, LIST, OWN, TAGS

PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
WRITTEN: dict[str, tuple[str, str, str, list[tuple[str, Any]]]] = {
    "hermes": (
        f"<think>\nHm.\n</think>\n\nI look.\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{PARIS}\n</tool_call><|im_end|>",
        "I look.",
        "Hm.",
        [("weather", {"city": "Paris"})] * 2,
    ),
    "own": (
        '<|end|>(a)<|end|>( b ) Yes. %%x%%@weather#12 {"city": "}@"}@@@now#3{}@end',
        "Yes.",
        "a / b",
        [("weather", {"city": "}@"}), ("now", {})],
    ),
    "tags": (
        " Yes. \n<call weather><city>3</city><days>3</days><exact>True</exact></call><call now></call>",
        " Yes.",
        "",
        [("weather", {"city": "3", "days": 3, "exact": True}), ("now", {})],
    ),
    "list": (f"[THINK]a[/THINK]\n[TOOL_CALLS][{PARIS}, {PARIS}]", "", "a", [("weather", {"city": "Paris"})] * 2),
    "leading": (
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eot|>',
        "",
        "",
        [("weather", {"city": "Paris"})],
    ),
}
MODES = {"stream": ParserOptions(tools=TOOLS), "whole": ParserOptions(tools=TOOLS, whole_calls=True)}


def template_of(spec: dict[str, Any]) -> ResponseTemplate:
    template = read_response_template(spec)
    assert template is not None
    return template


def parse(spec: dict[str, Any], options: ParserOptions, pieces: list[str], tail: str = "") -> list[Part]:
    parser = TemplateParser(template_of(spec), CallIds.ANY, tail, options)
    found = [part for piece in pieces for part in parser.push(piece)]
    return [*found, *parser.flush()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRITTEN)
def test_parser_reads_what_the_template_describes(name: str, mode: str) -> None:
    text, answer, reasoning, calls = WRITTEN[name]
    found = joined(parse(ALL_TEMPLATES[name], MODES[mode], [text]))
    assert [(call, json.loads(arguments)) for _, call, arguments in found[2]] == calls
    assert found[:2] == (answer, reasoning)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=40)  # for each case
@given(data=st.data())
def test_parser_gives_equal_parts_for_any_pieces(name: str, mode: str, data: st.DataObject) -> None:
    text = WRITTEN[name][0]
    text = text[: data.draw(st.integers(1, len(text)))]
    whole = joined(parse(ALL_TEMPLATES[name], MODES[mode], [text]))
    pieces = cut(text, data.draw(st.lists(st.integers(0, 10_000), max_size=60)))
    assert joined(parse(ALL_TEMPLATES[name], MODES[mode], pieces)) == whole
    assert joined(parse(ALL_TEMPLATES[name], MODES[mode], list(text))) == whole


def told(events: list[Event]) -> list[tuple[str, str]]:
    """The events as pairs of a kind and a text, with neighbouring pieces joined."""
    found: list[tuple[str, str]] = []
    for event in events:
        match event:
            case Opened(region):
                found.append(("region_open", region.name))
            case Piece(text) if found[-1][0] == "region_chunk":
                found[-1] = ("region_chunk", found[-1][1] + text)
            case Piece(text):
                found.append(("region_chunk", text))
            case Closed():
                found.append(("region_close", ""))
    return found


@pytest.mark.parametrize("name", ALL_TEMPLATES)
@given(data=st.data())
def test_scanner_finds_the_regions_of_transformers(name: str, data: st.DataObject) -> None:
    spec = ALL_TEMPLATES[name]
    marks = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<|im_end|>",
        "<|end|>(",
        ")",
        "@now#1",
        "@@",
        "@end",
        "%%",
    ]
    marks += [
        "<call now>",
        "</call>",
        "[THINK]",
        "[/THINK]",
        "[TOOL_CALLS]",
        "</s>",
        "<|eot|>",
        '{"name"',
        "a",
        " ",
        "\n",
        "@",
        "<",
    ]
    pieces = data.draw(st.lists(st.sampled_from(marks), max_size=14))
    text = "".join(pieces)
    cuts = cut(text, data.draw(st.lists(st.integers(0, 10_000), max_size=20))) if text else []
    # Every value is text, so that the oracle raises for none.
    fields = {
        key: {k: v for k, v in field.items() if k in ("open", "open_pattern", "close", "close_pattern")}
        for key, field in spec["fields"].items()
    }
    plain = {
        **spec,
        "fields": {key: {**field, "transform": "{content}", "repeats": True} for key, field in fields.items()},
    }
    oracle = ResponseParser(plain, prefix="")
    scanner = RegionScanner(template_of(plain))
    theirs, ours = [], []
    for piece in cuts:
        theirs += oracle.feed(piece)
        ours += scanner.feed(piece)
    theirs += oracle.finalize()[1]
    ours += scanner.end()
    expected: list[tuple[str, str]] = []
    for event in theirs:
        text = event["field"] if event["type"] == "region_open" else event.get("text", "")
        if event["type"] == "region_chunk" and expected[-1][0] == "region_chunk":
            text = expected.pop()[1] + text
        expected.append((event["type"], text))
    assert told(ours) == expected


@pytest.mark.parametrize("name", ["hermes", "list", "leading"])
def test_parser_agrees_with_the_library_on_a_message(name: str) -> None:
    text = WRITTEN[name][0]
    message = parse_response(text, ALL_TEMPLATES[name], prefix="")
    answer, reasoning, calls = joined(parse(ALL_TEMPLATES[name], MODES["whole"], [text]))
    assert (message.get("content", ""), message.get("reasoning_content", "")) == (answer, reasoning)
    theirs = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    assert [(call, json.loads(arguments)) for _, call, arguments in calls] == theirs


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (HERMES, "a <tool_call>\n{\"name\": 3}</tool_call>"),
        (HERMES, "a <tool_call>[not JSON"),
        (OWN, "@weather#12 [1]@@"),
        (OWN, '@weather#12 {"a": }@end'),
        (LEADING, '{"name": "unknown", "parameters": {}}'),
        (LEADING, '{"name": "weather"}<|eot|>'),
    ],
)  # fmt: skip
def test_parser_keeps_what_is_no_call(spec: dict[str, Any], text: str) -> None:
    for pieces in ([text], list(text)):
        answer, _, calls = joined(parse(spec, MODES["whole"], pieces))
        assert (answer.split(), calls) == (text.split(), [])


@pytest.mark.parametrize("mode", MODES)
def test_parser_of_an_output_cut_in_the_mark_after_a_call_gives_the_call_alone(mode: str) -> None:
    answer, _, calls = joined(parse(HERMES, MODES[mode], [f"<tool_call>\n{PARIS}\n</tool_c"]))
    assert (answer, [call for _, call, _ in calls]) == ("", ["weather"])


def test_parser_without_tools_shows_calls_as_text() -> None:
    text = "I look.\n<tool_call>\n{}\n</tool_call>"
    assert joined(parse(HERMES, ParserOptions(), [text])) == (text, "", [])


@pytest.mark.parametrize(
    ("spec", "begun"),
    [(HERMES, '<tool_call>\n{"name": "weather", "arguments": '), (OWN, "@weather#12 "), (LIST, '[TOOL_CALLS][{"name": "weather", "arguments": ')],
)  # fmt: skip
def test_parser_streams_arguments_as_they_come(spec: dict[str, Any], begun: str) -> None:
    parser = TemplateParser(template_of(spec), CallIds.ANY, "", MODES["stream"])
    [first, *_] = parser.push(begun + '{"city": "Pa')
    assert isinstance(first, ToolCall)
    assert (first.name, first.call_id) == ("weather", "12" if spec is OWN else None)
    assert parser.push("ris") == (ToolCall(0, "ris"),)


def test_parser_continues_what_the_prompt_began() -> None:
    template = template_of(HERMES)
    tail = template.tail("<|im_start|>user\n<think>x</think><|im_end|>\n<|im_start|>assistant\n<think>\n")
    parser = TemplateParser(template, CallIds.ANY, tail, MODES["stream"])
    assert parser.in_reasoning
    assert parser.push("Hm.") == (Reasoning("Hm."),)
    assert parser.push("\n</think>\n\nYes") == (Text("Yes"),)
    assert not parser.in_reasoning


def test_parser_can_leave_reasoning_out_and_allow_one_call() -> None:
    options = ParserOptions(tools=TOOLS, show_reasoning=False, parallel_calls=False)
    _, reasoning, calls = joined(parse(HERMES, options, [WRITTEN["hermes"][0]]))
    assert (reasoning, len(calls)) == ("", 1)


@pytest.mark.parametrize("spec", [None, {}, "text", {"version": 2, "fields": {}}, {"start_anchor": "a", "fields": {"content": {"open_pattern": "("}}}, {**TAGS, "fields": {"x": {"content": "no-such-parser"}}}])  # fmt: skip
def test_template_that_cannot_be_read_is_not_used(spec: Any) -> None:
    assert read_response_template(spec) is None


SLOW = r"(?:x|xx)+(?=\d)"  # takes a time that is exponential in the number of x
HOSTILE: dict[str, Any] = {
    "start_anchor": "assistant",
    "fields": {
        "thinking": {"open_pattern": SLOW, "close_pattern": SLOW},
        "tool_calls": {"open_pattern": SLOW, "close": "@@", "content": "json"},
        "content": {},
    },
}


def test_patterns_that_take_for_ever_cost_an_answer_a_bounded_time(caplog: pytest.LogCaptureFixture) -> None:
    pieces = ["x" * 40, *"x" * 60, " Yes."]
    began_s = time.thread_time()
    found = parse(HOSTILE, MODES["stream"], pieces, tail="x" * 40)
    assert time.thread_time() - began_s < 2.0
    assert "".join(part.text for part in found if isinstance(part, Text)).endswith("x" * 60 + " Yes.")
    assert [record.message for record in caplog.records if "response_template took more than 0.5 s" in record.message]


def test_patterns_in_a_long_answer_keep_their_time() -> None:
    """Each piece adds to what the patterns may take, so that a long answer with honest patterns is read to its end."""
    text, answer, reasoning, calls = WRITTEN["own"]
    long = "word " * 4000
    found = parse(OWN, MODES["stream"], [*(f"{word} " for word in long.split()), *text])
    assert answer in "".join(part.text for part in found if isinstance(part, Text))
    assert "".join(part.text for part in found if isinstance(part, Reasoning)) == reasoning
    assert len([part for part in found if isinstance(part, ToolCall)]) >= len(calls)


@pytest.mark.parametrize("nested", [False, True])
def test_tags_that_take_for_ever_are_a_malformed_call(nested: bool) -> None:
    slow = {"tag_pattern": rf"(?P<key>k)=(?P<value>{SLOW})"}
    tags = {"tag_pattern": r"(?P<key>k)=(?P<value>.*)", "value_parser": {"name": "xml-inline", "args": slow}}
    spec: dict[str, Any] = {
        "start_anchor": "assistant",
        "fields": {
            "tool_calls": {
                "open_pattern": r"<call (?P<name>\w+)>",
                "close": "</call>",
                "content": "xml-inline",
                "content_args": tags if nested else slow,
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {},
        },
    }
    written = f"<call weather>k={'k=' if nested else ''}{'x' * 60}</call>"
    began_s = time.thread_time()
    found = parse(spec, MODES["whole"], [written])
    assert time.thread_time() - began_s < 2.0
    assert found == [Text(written)]


def test_anchor_that_takes_for_ever_leaves_no_tail() -> None:
    spec = {**OWN, "start_anchor_pattern": SLOW}
    template = template_of(spec)
    began_s = time.thread_time()
    assert template.tail("x" * 60) == ""
    assert not template_of(HOSTILE).reads("x" * 60, "f")
    assert time.thread_time() - began_s < 2.0
