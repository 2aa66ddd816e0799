"""Defines how each family writes its tool calls, for grammars: the fixed text around names and arguments.

In `head`, NAME stands for the function's name. Markers that are tokens of the vocabulary become these tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

import msgspec


class Arguments(Enum):
    """The notation of a call's arguments."""

    JSON = auto()
    TAGS = auto()  # one element per argument; strings are raw text
    PYTHON = auto()  # keyword arguments
    QUOTED = auto()  # JSON with bare keys and its own quotes


@dataclass(frozen=True, slots=True)
class CallLayout:
    """The text of calls: `open`, calls with `between` between them, `close`. A call is `head`, its arguments, `tail`.

    Attributes:
        several: whether an answer may have several calls.
        key: what stands before the value of an argument written as TAGS; KEY stands for its name.
        value_end: what ends such a value. `separator` follows.
        quote: both ends of a string written as QUOTED.
        digits_after_name: a number follows the name in `head`, in the place of INDEX.
        answer_open: what stands before an answer that is not a call.
        reasoning: the beginning and the end of reasoning, where the family has no single tokens for them.
    """

    head: str
    tail: str
    open: str = ""
    between: str = ""
    close: str = ""
    several: bool = True
    arguments: Arguments = Arguments.JSON
    key: str = ""
    value_end: str = ""
    separator: str = ""
    quote: str = ""
    answer_open: str = ""
    reasoning: tuple[str, str] | None = None

    @property
    def begin(self) -> str:
        """The fixed text with which calls begin."""
        return self.open + self.head.partition("NAME")[0]


def sample_call(layout: CallLayout, name: str) -> str:
    """Return a call of the function `name` with the argument a = 1, as the layout has it."""
    match layout.arguments:
        case Arguments.JSON:
            arguments = '{"a": 1}'
        case Arguments.TAGS:
            arguments = f"{layout.key.replace('KEY', 'a')}1{layout.separator}{layout.value_end}{layout.separator}"
        case Arguments.PYTHON:
            arguments = "a=1"
        case Arguments.QUOTED:
            arguments = "{a:1}"
    head = layout.head.replace("NAME", name).replace("INDEX", "0")
    return f"{layout.open}{head}{arguments}{layout.tail}{layout.close}"


_OBJECT = '{"name": "NAME", "arguments": '
_LIST = CallLayout(_OBJECT, "}", "[", ", ", "]")

GENERIC = CallLayout('{"name": "NAME", "parameters": ', "}", "[", ", ", "]")
"""For models whose family is not known."""


def generic_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """Return earlier calls, in OpenAI's form with objects or texts as arguments, as GENERIC has them."""
    return GENERIC.open + GENERIC.between.join(_generic_call(call["function"]) for call in calls) + GENERIC.close


def _generic_call(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    written = arguments if isinstance(arguments, str) else _json(arguments)
    return GENERIC.head.replace('"NAME"', _json(function["name"])) + written + GENERIC.tail


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


LAYOUTS: Mapping[str, CallLayout] = MappingProxyType(
    {
        "hermes": CallLayout("<tool_call>\n" + _OBJECT, "}\n</tool_call>", between="\n"),
        "qwen_xml": CallLayout(
            "<tool_call>\n<function=NAME>\n",
            "</function>\n</tool_call>",
            between="\n",
            arguments=Arguments.TAGS,
            key="<parameter=KEY>\n",
            value_end="</parameter>",
            separator="\n",
        ),
        "glm": CallLayout(
            "<tool_call>NAME\n",
            "</tool_call>",
            between="\n",
            arguments=Arguments.TAGS,
            key="<arg_key>KEY</arg_key>\n<arg_value>",
            value_end="</arg_value>",
            separator="\n",
        ),
        "llama_json": CallLayout('{"name": "NAME", "parameters": ', "}", several=False),
        "llama_python": CallLayout("NAME(", ")", "[", ", ", "]", arguments=Arguments.PYTHON),
        "mistral": CallLayout("[TOOL_CALLS]NAME[ARGS]", ""),
        "mistral_list": replace(_LIST, open="[TOOL_CALLS][", close="]"),
        "deepseek": CallLayout(
            "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            open="<｜tool▁calls▁begin｜>",
            close="<｜tool▁calls▁end｜>",
        ),
        "deepseek_r1": CallLayout(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            open="<｜tool▁calls▁begin｜>",
            between="\n",
            close="<｜tool▁calls▁end｜>",
        ),
        "granite": replace(_LIST, open="<|tool_call|>[", close="]"),
        "phi": replace(_LIST, open="<|tool_call|>[", close="]<|/tool_call|>"),
        "kimi": CallLayout(
            "<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            open="<|tool_calls_section_begin|>",
            close="<|tool_calls_section_end|>",
        ),
        "gemma": CallLayout("<|tool_call>call:NAME", "<tool_call|>", arguments=Arguments.QUOTED, quote='<|"|>'),
        # A turn ends with its call: <|call|> is one of the family's end tokens.
        "harmony": CallLayout(
            "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
            "",
            several=False,
            answer_open="<|channel|>final<|message|>",
            reasoning=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        ),
    }
)
