"""Defines the formats in which families of models write reasoning and tool calls, and finds that of a checkpoint by its chat template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from runtime.text.response_template import ResponseTemplate


class CallIds(StrEnum):
    """What a chat template requires of the ids of tool calls."""

    ANY = "any"
    NINE = "nine"  # nine letters or digits
    NUMBERED = "numbered"  # functions.NAME:INDEX, counted over the chat


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """An object with `name` and `arguments` (or `parameters`), or a list of such objects, then optionally `ends`."""

    ends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """A header with the name, `separator`, the arguments as a JSON object, then optionally `ends`."""

    header: re.Pattern[str]  # groups `name` and perhaps `id`
    separator: str
    ends: tuple[str, ...] = ()
    or_json: bool = False  # the trigger may also begin JsonCalls


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """A header with the name, then arguments as `key_open` KEY `value_open` VALUE `value_close`, then `end` and optionally `ends`."""

    header: re.Pattern[str]
    key_open: str
    value_open: str
    value_close: str
    end: str
    ends: tuple[str, ...] = ()
    key_close: str = ""


@dataclass(frozen=True, slots=True)
class PythonCalls:
    """A Python list of calls with keyword arguments that are literals, up to `end` or the end of the text."""

    end: str


@dataclass(frozen=True, slots=True)
class QuotedCalls:
    """`NAME{key:value,…}` up to `end`: JSON with bare keys, and with `quote` at both ends of a string."""

    quote: str
    end: str


CallSyntax = JsonCalls | NamedCalls | TaggedCalls | PythonCalls | QuotedCalls


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How one family writes its output. No marker is the beginning of another one.

    Without `triggers`, a call is what the answer begins with, and its name must be one of the request's tools.
    """

    name: str
    calls: CallSyntax | None = None
    triggers: tuple[str, ...] = ()
    reasoning: tuple[str, str] | None = None
    ignored: tuple[str, ...] = ()  # removed from the answer
    call_ids: CallIds = CallIds.ANY
    reasons_again: bool = False  # reasoning may also follow parts of the answer and calls
    tokens: tuple[str, ...] = ()  # special tokens inside of markers
    template: ResponseTemplate | None = None  # the checkpoint's own, which reads the output then

    @property
    def reads_calls(self) -> bool:
        return self.calls is not None if self.template is None else self.template.has_calls

    @property
    def markers(self) -> frozenset[str]:
        """The texts that the parser must see, even if they are special tokens."""
        found = {*self.triggers, *(self.reasoning or ()), *self.ignored, *self.tokens}
        match self.calls:
            case JsonCalls(ends):
                found |= {*ends}
            case NamedCalls(_, separator, ends):
                found |= {separator, *ends}
            case TaggedCalls(_, key_open, value_open, value_close, end, ends, key_close):
                found |= {key_open, value_open, value_close, end, *ends, key_close}
            case PythonCalls(end):
                found |= {end}
            case QuotedCalls(quote, end):
                found |= {quote, end}
        return frozenset(found - {""})


OWN_FORMAT = "response_template"
"""The name of a format that only the checkpoint's own template describes."""
_THINK = ("<think>", "</think>")

HERMES = OutputFormat("hermes", JsonCalls(("</tool_call>",)), ("<tool_call>",), _THINK)
QWEN_XML = OutputFormat(
    "qwen_xml",
    TaggedCalls(
        re.compile(r"\s*<function=(?P<name>[^>\n]+)>\s*"),
        "<parameter=",
        ">",
        "</parameter>",
        "</function>",
        ("</tool_call>",),
    ),
    ("<tool_call>",),
    _THINK,
)
GLM = OutputFormat(
    "glm",
    TaggedCalls(
        re.compile(r"\s*(?P<name>[^<\s]+)\s*"),
        "<arg_key>",
        "<arg_value>",
        "</arg_value>",
        "</tool_call>",
        key_close="</arg_key>",
    ),
    ("<tool_call>",),
    _THINK,
    ignored=("<|user|>", "<|observation|>"),
)
LLAMA_JSON = OutputFormat("llama_json", JsonCalls(), ignored=("<|python_tag|>", "<|eom_id|>", "<|eot_id|>"))
LLAMA_PYTHON = OutputFormat("llama_python", PythonCalls("<|python_end|>"), ignored=("<|python_start|>",))
MISTRAL = OutputFormat(
    "mistral",
    NamedCalls(re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\w*)?"), "[ARGS]", or_json=True),
    ("[TOOL_CALLS]",),
    ("[THINK]", "[/THINK]"),
    call_ids=CallIds.NINE,
    tokens=("[CALL_ID]",),
)
MISTRAL_LIST = replace(MISTRAL, name="mistral_list")
DEEPSEEK = OutputFormat(
    "deepseek",
    NamedCalls(re.compile(r"\s*(?P<name>[^<\s]+)\s*"), "<｜tool▁sep｜>", ("<｜tool▁call▁end｜>",)),
    ("<｜tool▁call▁begin｜>",),
    _THINK,
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
DEEPSEEK_R1 = OutputFormat(
    "deepseek_r1",
    NamedCalls(re.compile(r"\s*function<｜tool▁sep｜>(?P<name>[^\n]+)\n"), "```json\n", ("```", "<｜tool▁call▁end｜>")),
    ("<｜tool▁call▁begin｜>",),
    _THINK,
    ignored=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    tokens=("<｜tool▁sep｜>",),
)
GRANITE = OutputFormat("granite", JsonCalls(), ("<|tool_call|>", "<tool_call>"))
PHI = OutputFormat("phi", JsonCalls(("<|/tool_call|>",)), ("<|tool_call|>", "functools"))
KIMI = OutputFormat(
    "kimi",
    NamedCalls(
        re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.-]+):\d+)\s*"),
        "<|tool_call_argument_begin|>",
        ("<|tool_call_end|>",),
    ),
    ("<|tool_call_begin|>",),
    _THINK,
    ignored=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    call_ids=CallIds.NUMBERED,
)
GEMMA = OutputFormat(
    "gemma",
    QuotedCalls('<|"|>', "<tool_call|>"),
    ("<|tool_call>call:",),
    ("<|channel>thought\n", "<channel|>"),
    tokens=("<|tool_call>", "<|channel>"),
)
HARMONY = OutputFormat(
    "harmony",
    NamedCalls(
        re.compile(r"(?P<name>[\w.-]+)\s*(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?\s*(?:json|code)?\s*"),
        "<|message|>",
        ("<|call|>",),
    ),
    (" to=functions.",),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    # The names of the channels stand between the markers.
    ignored=(
        "<|start|>assistant",
        "<|channel|>commentary",
        "<|channel|>final",
        "<|constrain|>json",
        "<|message|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
    ),
    reasons_again=True,
    tokens=("<|start|>", "<|channel|>", "<|constrain|>"),
)
GENERIC = OutputFormat("generic", JsonCalls())
"""A list of calls in JSON, or one call: what a grammar makes a model of an unknown family write."""
THINKING = OutputFormat("thinking", reasoning=_THINK)
ALL_FORMATS = (
    HERMES,
    QWEN_XML,
    GLM,
    LLAMA_JSON,
    LLAMA_PYTHON,
    MISTRAL,
    MISTRAL_LIST,
    DEEPSEEK,
    DEEPSEEK_R1,
    GRANITE,
    PHI,
    KIMI,
    GEMMA,
    HARMONY,
    THINKING,
)

# The first entry whose texts are all in the chat template is the checkpoint's format.
_SIGNS: tuple[tuple[tuple[str, ...], OutputFormat], ...] = (
    (("<tool_call>", "<function="), QWEN_XML),
    (("<tool_call>", "<arg_key>"), GLM),
    (("<|tool_calls_section_begin|>",), KIMI),
    (("<｜tool▁call▁begin｜>", "```json"), DEEPSEEK_R1),
    (("<｜tool▁call▁begin｜>",), DEEPSEEK),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<|tool_call>call:",), GEMMA),
    (("<|start_of_role|>", "tool_call"), GRANITE),
    (("<|tool_call|>",), PHI),
    (("<|tool|>", "<|assistant|>"), PHI),
    (("<tool_call>",), HERMES),
    (("<|header_start|>", "tools"), LLAMA_PYTHON),
    (("<|start_header_id|>", "parameters"), LLAMA_JSON),
    (("<|channel|>", "<|message|>"), HARMONY),
    (("<think>",), THINKING),
)


def detect_format(templates: Sequence[str]) -> OutputFormat | None:
    """Return the format of a checkpoint with these chat templates. None: its output is plain text."""
    text = "\n".join(templates)
    return next((found for signs, found in _SIGNS if all(sign in text for sign in signs)), None)
