"""Determines whether a chat template takes the arguments of earlier tool calls as objects or as JSON text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import msgspec

Turn = dict[str, Any]

_ARGUMENTS = {"probe": "value"}
_FUNCTION = {
    "name": "probe",
    "description": "probe",
    "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
}
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


def has_calls(turns: Sequence[Turn]) -> bool:
    return any(turn.get("tool_calls") for turn in turns)


def wants_text(render: Callable[[Mapping[str, Any]], str]) -> bool:
    """Render a small chat, and return whether its arguments must be JSON text.

    Objects are preferred. They are wrong where the template fails on them (DeepSeek's adds them to a string) or writes them in Python's notation.
    """
    by_object, by_text = _try(render, _ARGUMENTS), _try(render, msgspec.json.encode(_ARGUMENTS).decode())
    if by_text is None:
        return False
    return by_object is None or ("{'probe'" in by_object and "{'probe'" not in by_text)


def as_text(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns with all arguments as JSON text."""
    return [
        {**turn, "tool_calls": [_written(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in turns
    ]


def _written(call: Turn) -> Turn:
    function = call["function"]
    arguments = function["arguments"]
    text = (
        arguments
        if isinstance(arguments, str)
        else msgspec.json.format(msgspec.json.encode(arguments), indent=0).decode()
    )
    return {**call, "function": {**function, "arguments": text}}


def _try(render: Callable[[Mapping[str, Any]], str], arguments: Any) -> str | None:
    call = {"id": "functions", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    turns: list[Turn] = [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    try:
        return render({"messages": turns, "tools": [{"type": "function", "function": _FUNCTION}]})
    except _FAILURES:
        return None
