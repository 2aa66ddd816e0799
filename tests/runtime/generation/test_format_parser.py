"""Every family's output whole and in random pieces: answer, reasoning and calls; calls that are not well-formed; pieces as they come."""

import json
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.generation.format_parser import FormatParser, ParserOptions
from runtime.generation.parts import Part, Reasoning, Text, ToolCall
from runtime.text import output_format as formats
from runtime.text.output_format import ALL_FORMATS, OutputFormat, detect_format
from tests.runtime.generation.outputs import OUTPUTS, TOOLS, Written

MODES = {
    "stream": ParserOptions(tools=TOOLS),
    "whole": ParserOptions(tools=TOOLS, whole_calls=True),
    "no tools": ParserOptions(),
}


def parse(output_format: OutputFormat, options: ParserOptions, pieces: Iterable[str]) -> list[Part]:
    parser = FormatParser(output_format, options)
    found = [part for piece in pieces for part in parser.push(piece)]
    return [*found, *parser.flush()]


def joined(parts: list[Part]) -> tuple[str, str, list[tuple[int, str | None, str]]]:
    """Return the answer, the reasoning, and each call's index, name and arguments."""
    calls: dict[int, tuple[str | None, str]] = {}
    for part in parts:
        if isinstance(part, ToolCall):
            name, arguments = calls.get(part.index, (part.name, ""))
            calls[part.index] = name, arguments + part.arguments
    return (
        "".join(part.text for part in parts if isinstance(part, Text)),
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        [(index, name, arguments) for index, (name, arguments) in calls.items()],
    )


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % len(text) for place in places)})
    return [text[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("written", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("mode", ["stream", "whole"])
def test_parser_reads_every_format(written: Written, mode: str) -> None:
    answer, reasoning, calls = joined(parse(written.format, MODES[mode], [written.text]))
    assert [(name, json.loads(arguments)) for _, name, arguments in calls] == list(written.calls)
    assert [index for index, _, _ in calls] == list(range(len(written.calls)))
    assert (answer, reasoning) == (written.answer, written.reasoning)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OUTPUTS)
@settings(max_examples=40)  # for each of 48 cases
@given(data=st.data())
def test_parser_gives_equal_parts_for_any_pieces(name: str, mode: str, data: st.DataObject) -> None:
    written, options = OUTPUTS[name], MODES[mode]
    text = written.text[: data.draw(st.integers(1, len(written.text)))]
    pieces = cut(text, data.draw(st.lists(st.integers(0, 10_000), max_size=60)))
    whole = joined(parse(written.format, options, [text]))
    assert joined(parse(written.format, options, pieces)) == whole
    assert joined(parse(written.format, options, list(text))) == whole


@given(
    st.sampled_from(ALL_FORMATS),
    st.sampled_from(list(MODES.values())),
    st.lists(
        st.sampled_from(sorted({marker for entry in ALL_FORMATS for marker in entry.markers}))
        | st.sampled_from(['{"name": "now", "arguments": ', "{", "}", "[", "]", '"', "\\", "now", " ", "\n", "a", "="])
    ),
)
def test_parser_takes_any_text(output_format: OutputFormat, options: ParserOptions, pieces: list[str]) -> None:
    whole = joined(parse(output_format, options, ["".join(pieces)] if any(pieces) else []))
    assert joined(parse(output_format, options, pieces)) == whole


@pytest.mark.parametrize(
    ("output_format", "text"),
    [
        (formats.HERMES, 'a <tool_call>\n{"name": "now", "arguments": {]}}\n</tool_call> b'),
        (formats.HERMES, '<tool_call>{"name": "now", "arguments": 3}</tool_call>'),
        (formats.HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (formats.QWEN_XML, "<tool_call>\n<function>now</function></tool_call>"),
        (formats.MISTRAL, "[TOOL_CALLS]now is {}"),
        (formats.KIMI, "<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>"),
        (formats.GEMMA, "<|tool_call>call:now(3)<tool_call|>"),
        (formats.LLAMA_JSON, '{"answer": {"name": "now"}}'),
        (formats.LLAMA_JSON, '{"name": "unknown", "parameters": {}}'),
        (formats.LLAMA_PYTHON, "[now](https://example.org)"),
        (formats.LLAMA_PYTHON, "[now(time.now())]"),
    ],
)
def test_parser_keeps_what_is_no_call(output_format: OutputFormat, text: str) -> None:
    answer, _, calls = joined(parse(output_format, MODES["whole"], [text]))
    assert (answer, calls) == (text, [])


@pytest.mark.parametrize("mode", ["stream", "whole"])
@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "deepseek", "kimi"])
def test_parser_of_an_output_cut_in_the_mark_after_a_call_gives_the_call_alone(name: str, mode: str) -> None:
    written = OUTPUTS[name]
    last = written.text.rstrip()
    end = {
        "hermes": "</tool_call>",
        "qwen_xml": "</tool_call>",
        "deepseek": "<｜tool▁call▁end｜>",
        "kimi": "<|tool_call_end|>",
    }[name]
    text = last[: last.rindex(end) + 4]
    answer, _, calls = joined(parse(written.format, MODES[mode], [text]))
    assert [(call, json.loads(arguments)) for _, call, arguments in calls] == list(written.calls)
    assert answer.strip() == written.answer


def test_parser_streams_arguments_as_they_come() -> None:
    parser = FormatParser(formats.HERMES, MODES["stream"])
    assert parser.push('<tool_call>{"name": "weather", "arguments": {"city": "Pa') == (
        ToolCall(0, "", None, "weather"),
        ToolCall(0, '{"city": "Pa'),
    )
    assert parser.push("ris") == (ToolCall(0, "ris"),)
    tagged = FormatParser(formats.QWEN_XML, MODES["stream"])
    tagged.push("<tool_call><function=weather><parameter=city>\nPa")
    assert tagged.push('ri"s') == (ToolCall(0, 'ri\\"s'),)


def test_parser_drops_calls_after_the_first_if_they_are_not_parallel() -> None:
    written = OUTPUTS["hermes"]
    for whole in (False, True):
        options = ParserOptions(tools=TOOLS, parallel_calls=False, whole_calls=whole)
        assert [name for _, name, _ in joined(parse(written.format, options, [written.text]))[2]] == ["weather"]


def test_parser_starts_in_reasoning_that_the_prompt_opened() -> None:
    options = ParserOptions(starts_in_reasoning=True)
    parser = FormatParser(formats.THINKING, options)
    found: list[tuple[tuple[Part, ...], bool]] = [
        (parser.push(text), parser.in_reasoning) for text in ("so", " it is\n</think>\n\nYes")
    ]
    assert found == [((Reasoning("so"),), True), ((Reasoning(" it is"), Text("Yes")), False)]
    hidden = ParserOptions(starts_in_reasoning=True, show_reasoning=False)
    assert parse(formats.THINKING, hidden, ["so</think>Yes"]) == [Text("Yes")]


def test_parser_leaves_plain_answers_alone() -> None:
    text = "  Use <think> first,\n then <tool_call>.  "
    assert "".join(joined(parse(formats.THINKING, MODES["stream"], list(text)))[0]) == text


def test_markers_are_no_beginnings_of_each_other() -> None:
    for output_format in ALL_FORMATS:
        texts = [*output_format.triggers, *output_format.ignored]
        assert not [(a, b) for a in texts for b in texts if a != b and b.startswith(a)], output_format.name


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("<tool_call>\\n{\"name\": <function-name>, \"arguments\": <args-json-object>}", formats.HERMES),
        ("<tool_call>\\n<function=example_function_name>\\n<parameter=a>", formats.QWEN_XML),
        ("{{ '[TOOL_CALLS] [' }}", formats.MISTRAL_LIST),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", formats.MISTRAL),
        ("{{ '<|start|>assistant<|channel|>final<|message|>' }}", formats.HARMONY),
        ("<|im_start|>{{ content.split('</think>')[-1] }} <think>", formats.THINKING),
        ("<|im_start|>", None),
    ],
)  # fmt: skip
def test_detect_format_reads_the_template(template: str, found: OutputFormat | None) -> None:
    assert detect_format([template]) is found
