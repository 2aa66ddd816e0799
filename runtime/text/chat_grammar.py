"""Composes the grammar of a chat's answer from its tool calls and what the answer must match. It takes as long as the checks of its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from runtime.errors import InvalidRequest
from runtime.text.call_grammar import CallGrammar, Function
from runtime.text.call_layout import GENERIC, LAYOUTS, CallLayout
from runtime.text.constraint import Wanted, part_of
from runtime.text.grammar import LEADING_SPACE, check_part, compose
from runtime.text.lark_rules import Rules
from runtime.text.output_format import OWN_FORMAT, OutputFormat

_TEXT = "/(.|\\n)*/"
_NO_CALL = "/[^{\\[](.|\\n)*/"


class Calls(Enum):
    """The tool calls that an answer may have besides text."""

    NONE = auto()
    ALLOWED = auto()
    REQUIRED = auto()  # one or more calls, and nothing else


@dataclass(frozen=True, slots=True)
class ChatGrammar:
    """The grammar of one answer. `wanted` holds for an answer that is not a call, and is unused where calls are required; None = any text."""

    calls: Calls = Calls.NONE
    functions: tuple[Function, ...] = ()
    several: bool = True
    wanted: Wanted | None = None

    @property
    def is_free(self) -> bool:
        """Whether any answer will do."""
        if self.wanted is not None or self.calls is Calls.REQUIRED:
            return False
        return self.calls is Calls.NONE or not any(function.strict for function in self.functions)


def chat_grammar(
    chat: ChatGrammar, output_format: OutputFormat | None, marker_ids: Mapping[str, int], *, after_reasoning: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the grammar and notes for the `Warning` header. `marker_ids`: texts that are tokens of their own.

    Raises InvalidRequest naming the keyword and the path of what cannot be enforced.
    """
    layout = layout_of(output_format)
    if chat.calls is Calls.ALLOWED and output_format is not None and output_format.name == OWN_FORMAT:
        param = "tools" if chat.wanted is None else chat.wanted.param
        raise InvalidRequest(
            f"{param} cannot be enforced beside calls that this model may make, whose response_template is in no layout that grammars have;"
            ' send tool_choice "none" or "required", or functions that are not strict',
            param=param,
        )
    rules = Rules(marker_ids)
    notes: list[str] = []
    options: list[str] = []
    if chat.wanted is not None and chat.calls is Calls.ALLOWED and layout.begin.startswith("{"):
        raise InvalidRequest(
            f"{chat.wanted.param} and tools cannot be combined for this model, whose calls are JSON without a mark; send one of them",
            param=chat.wanted.param,
        )
    if chat.wanted is not None and chat.calls is not Calls.REQUIRED:
        notes += check_part(chat.wanted)
        options.append(f"{_opening(rules, layout)} {rules.part(part_of(chat.wanted.constraint))}".strip())
    if chat.calls is not Calls.NONE:
        writer = CallGrammar(rules, layout)
        if chat.calls is Calls.REQUIRED or chat.wanted is not None:
            options.append(writer.calls(chat.functions, several=chat.several))
        else:
            options.append(_free_text_with_calls(rules, writer, layout, chat, output_format))
        notes += writer.notes
    answer = " | ".join(options)
    lead = ""
    if after_reasoning:
        lead = "LEADING_SPACE? "
    elif layout.reasoning is not None:
        opens, ends = layout.reasoning
        lead = f"({rules.literal(opens)} {rules.text_before(ends)})? "
    text = rules.text(f"{lead}({answer})")
    if after_reasoning:
        text += f"\n{LEADING_SPACE}"
    return compose(text, rules.parts), tuple(dict.fromkeys(notes))


def layout_of(output_format: OutputFormat | None) -> CallLayout:
    return GENERIC if output_format is None else LAYOUTS.get(output_format.name, GENERIC)


def marker_texts(output_format: OutputFormat | None) -> Sequence[str]:
    """Return the texts of which a grammar must know whether they are tokens."""
    return () if output_format is None else sorted(output_format.markers)


def _opening(rules: Rules, layout: CallLayout) -> str:
    return rules.literal(layout.answer_open) if layout.answer_open else ""


def _free_text_with_calls(
    rules: Rules, writer: CallGrammar, layout: CallLayout, chat: ChatGrammar, output_format: OutputFormat | None
) -> str:
    """Return an expression for text in which every call is one of the functions'."""
    if layout.answer_open:
        return f"{_opening(rules, layout)} {_TEXT} | {writer.calls(chat.functions, several=False)}"
    if output_format is None or not output_format.triggers:
        # Without a trigger, only what the answer begins with is a call.
        calls = writer.calls(chat.functions, several=chat.several)
        return f"{calls} | {_NO_CALL} | {rules.literal('')}"
    if rules.marks(layout.begin):
        free = rules.add(f"{_TEXT} {writer.calls(chat.functions, several=chat.several)}")
    else:
        begun = next(filter(layout.begin.startswith, output_format.triggers), layout.open)
        calls = writer.calls(chat.functions, several=chat.several, without=begun)
        free = rules.add(f"{rules.text_before(begun)} {calls}")
    if chat.several and layout.several:
        return f"{free}* {_TEXT}"
    return f"{free} | {_TEXT}"
