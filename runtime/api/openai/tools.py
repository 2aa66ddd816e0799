"""Checks a request's `tools` and `tool_choice` and decides which tools the model sees and which calls it may or must make."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import InvalidRequest, NotSupported
from runtime.interfaces import ServedModel
from runtime.text.call_grammar import Function
from runtime.text.call_layout import LAYOUTS
from runtime.text.chat_grammar import Calls
from runtime.text.output_format import GENERIC, OutputFormat

MAX_TOOLS = 1024
MAX_NAME_CHARS = 256
_CONTROL = re.compile(r"[\x00-\x20<>\x7f]")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request's tools mean for its answer.

    Attributes:
        tools: for the chat template, in OpenAI's form.
        functions: those that may be called.
        output_format: in which the calls are written and read; None = the answer has none.
        names_one: the request names the function that must be called.
    """

    tools: tuple[dict[str, Any], ...] = ()
    functions: tuple[Function, ...] = ()
    output_format: OutputFormat | None = None
    parallel: bool = True
    calls: Calls = Calls.NONE
    names_one: bool = False

    @property
    def schemas(self) -> Mapping[str, Mapping[str, Any]] | None:
        """The parameters by name; None = calls are not read."""
        return {f.name: f.parameters for f in self.functions} if self.calls is not Calls.NONE else None


def plan_tools(
    model: ServedModel,
    tools: Sequence[dict[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    parallel: bool | None = None,
) -> ToolPlan:
    """Return the plan. Raises InvalidRequest or NotSupported naming the field.

    With the choice "none" the model sees no tools. A model whose format of calls is not known gets InvalidRequest for "auto"; where a call
    is required, a grammar makes it write a format that can be read.
    """
    if tools is not None and len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}",
            param="tools",
            limit=MAX_TOOLS,
            value=len(tools),
        )
    if tools is not None and not tools:
        raise InvalidRequest(
            "tools is empty; leave it out, or give at least one function", param="tools", limit=1, value=0
        )
    functions = {function.name: function for function in map(_function, range(len(tools or ())), tools or ())}
    names, calls = _chosen(choice, functions)
    if not tools or choice == "none":
        return ToolPlan()
    output_format = model.text.output_format
    reads = output_format is not None and output_format.reads_calls
    if output_format is None or not reads or (calls is Calls.REQUIRED and output_format.name not in LAYOUTS):
        if not reads and calls is not Calls.REQUIRED:
            raise InvalidRequest(
                "its chat template has no format of tool calls that this server can read; require a call with tool_choice,"
                " leave the tools out, or use a model whose template has one",
                model=model.name,
                param="tools",
            )
        output_format = replace(GENERIC, reasoning=output_format.reasoning if output_format else None)
    names_one = isinstance(choice, dict) and choice.get("type") == "function"
    return ToolPlan(
        tuple(tool for tool in tools if tool["function"]["name"] in names),
        tuple(function for name, function in functions.items() if name in names),
        output_format,
        parallel is not False and not names_one,
        calls,
        names_one,
    )


def _function(index: int, tool: dict[str, Any]) -> Function:
    kind = tool.get("type", "function")
    if kind != "function":
        raise NotSupported(f"tools[{index}] of type {kind!r} is not supported, only functions", param=f"tools[{index}]")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest(f"tools[{index}].function has no name", param=f"tools[{index}].function")
    name = function["name"]
    if len(name) > MAX_NAME_CHARS or _CONTROL.search(name):
        raise InvalidRequest(
            f"tools[{index}].function.name must have at most {MAX_NAME_CHARS} characters and no space, < or >",
            param=f"tools[{index}].function",
        )
    where = f"tools[{index}].function.parameters"
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{where} is not a JSON schema in the form of an object", param=where)
    return Function(name, parameters, function.get("strict") is True, where)


def _chosen(choice: str | dict[str, Any] | None, functions: Mapping[str, Function]) -> tuple[frozenset[str], Calls]:
    """Return the names that may be called, and whether one must be."""
    if choice in (None, "auto", "none"):
        return frozenset(functions), Calls.ALLOWED
    if choice == "required" and functions:
        return frozenset(functions), Calls.REQUIRED
    match choice:
        case "required":
            raise InvalidRequest('tool_choice "required" needs tools', param="tool_choice")
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in functions:
                raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
            return frozenset((name,)), Calls.REQUIRED
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(listed)}}:
            names = frozenset(tool.get("function", {}).get("name") for tool in listed if isinstance(tool, dict))
            if not names or not names <= functions.keys():
                raise InvalidRequest("tool_choice allows a tool that is not among the tools", param="tool_choice")
            return names, Calls.REQUIRED if mode == "required" else Calls.ALLOWED
    raise InvalidRequest(
        'tool_choice must be "auto", "none", "required", a function or allowed_tools', param="tool_choice"
    )
