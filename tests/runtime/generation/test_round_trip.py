"""Tool calls of every family go through its chat template as history, and are read back from what the template wrote."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.api.openai.history import chat_messages
from runtime.api.openai.types import ChatTurn, HistoryCall, HistoryFunction
from runtime.generation.format_parser import FormatParser, ParserOptions
from runtime.text.call_layout import LAYOUTS
from runtime.text.chat import ChatOptions, ChatTemplates
from runtime.text.output_format import OutputFormat
from tests.runtime.generation.test_format_parser import cut, joined
from tests.support.chat_templates import FAMILIES, FamilyTemplate

TOOLS: dict[str, Any] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {"type": "object", "properties": {"zone": {"type": "string"}}},
}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("weather", {"city": 'Köln <b> "x" {y}', "days": 3}),
    ("now", {"zone": "a\nb"}),
]
PLAIN_CALLS: list[tuple[str, dict[str, Any]]] = [("weather", {"city": "Köln, x", "days": 3}), ("now", {"zone": "UTC"})]


def rendered(
    family: FamilyTemplate, calls: list[tuple[str, dict[str, Any]]], ids: list[str]
) -> tuple[ChatTemplates, str]:
    """Return the family's templates and the text of an assistant's turn with these calls."""
    templates = ChatTemplates({"default": family.text}, {})
    history = [
        HistoryCall(
            id=ids[index], function=HistoryFunction(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
        )
        for index, (name, arguments) in enumerate(calls)
    ]
    turns = [
        ChatTurn(role="user", content="hello"),
        ChatTurn(role="assistant", content=None, tool_calls=history),
        *(ChatTurn(role="tool", content="rain", tool_call_id=call.id) for call in history),
    ]
    assert templates.output_format is not None
    messages = chat_messages(turns, templates.output_format.call_ids)
    tools = tuple(
        {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()
    )
    prompt = templates.render("m", messages[:1], ChatOptions(tools=tools))
    whole = templates.render("m", messages, ChatOptions(tools=tools, add_generation_prompt=False))
    assert prompt.endswith(family.opens)
    assert whole.startswith(prompt)
    results = templates.render("m", messages[2:], ChatOptions(add_generation_prompt=False))
    assert whole.endswith(family.closes + results)
    return templates, whole[len(prompt) : len(whole) - len(family.closes + results)]


def test_round_trip_has_a_template_of_every_family() -> None:
    assert set(FAMILIES) == set(LAYOUTS)


@dataclass(frozen=True)
class Written:
    """What a family's template wrote, and the calls in it."""

    output_format: OutputFormat
    text: str
    calls: list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest) -> Written:
    family = FAMILIES[request.param]
    calls = PLAIN_CALLS if request.param == "gemma" else CALLS  # Gemma's template escapes nothing
    calls = calls[:1] if family.one_call else calls
    templates, text = rendered(family, calls, ["call_1", "call_2"])
    assert templates.output_format is not None
    assert templates.output_format.name == request.param
    return Written(templates.output_format, text, calls)


@pytest.mark.parametrize("whole_calls", [False, True])
@given(places=st.lists(st.integers(0, 10_000), max_size=60))
def test_calls_in_the_history_are_read_back(written: Written, whole_calls: bool, places: list[int]) -> None:
    parser = FormatParser(written.output_format, ParserOptions(tools=TOOLS, whole_calls=whole_calls))
    parts = [*(part for piece in cut(written.text, places) for part in parser.push(piece)), *parser.flush()]
    answer, _, found = joined(parts)
    assert [(call, json.loads(arguments)) for _, call, arguments in found] == written.calls
    assert not answer.strip()


@pytest.mark.parametrize(
    ("name", "ids", "written"),
    [
        ("kimi", ["call_1", "x"], "functions.now:1"),
        ("kimi", ["functions.weather:5", "functions.now:6"], "functions.now:6"),
    ],
)
def test_ids_are_written_as_the_template_wants_them(name: str, ids: list[str], written: str) -> None:
    assert written in rendered(FAMILIES[name], PLAIN_CALLS, ids)[1]
