"""Checks a request's `tools` and `tool_choice` and decides which tools the model sees and whether its calls are read. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import InvalidRequest, NotSupported
from runtime.interfaces import ServedModel

MAX_TOOLS = 1024
_NOT_FORCED = 'use "auto" and say in a message which function to call'


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """`tools` go to the chat template in OpenAI's form. `schemas` are their parameters by name; None = calls are not read."""

    tools: tuple[dict[str, Any], ...] = ()
    schemas: Mapping[str, Mapping[str, Any]] | None = None
    parallel: bool = True
    notes: tuple[str, ...] = field(default=())  # for the `Warning` header


def plan_tools(
    model: ServedModel,
    tools: Sequence[dict[str, Any]] | None,
    choice: str | dict[str, Any] | None,
    parallel: bool | None = None,
) -> ToolPlan:
    """Return the plan. Raises InvalidRequest or NotSupported naming the field.

    With the choice "none" the model sees no tools. A model whose format of calls is not known gets InvalidRequest for "auto".
    """
    schemas: dict[str, Mapping[str, Any]] = {}
    strict = False
    if tools is not None and len(tools) > MAX_TOOLS:
        raise InvalidRequest(
            f"tools has {len(tools)} entries; the limit is {MAX_TOOLS}",
            param="tools",
            limit=MAX_TOOLS,
            value=len(tools),
        )
    for index, tool in enumerate(tools or ()):
        function = _function(index, tool)
        schemas[function["name"]] = function.get("parameters") or {}
        strict = strict or function.get("strict") is True
    allowed = _allowed(choice, schemas)
    if not tools or choice == "none":
        return ToolPlan()
    output_format = model.text.output_format
    if output_format is None or output_format.calls is None:
        raise InvalidRequest(
            "its chat template has no format of tool calls that this server can read;"
            ' send tool_choice "none", or use a model whose template has one',
            model=model.name,
            param="tools",
        )
    kept = tuple(tool for tool in tools if tool["function"]["name"] in allowed)
    notes = ("strict is not enforced: arguments are as the model wrote them",) if strict else ()
    return ToolPlan(kept, {name: schemas[name] for name in schemas if name in allowed}, parallel is not False, notes)


def _function(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type", "function")
    if kind != "function":
        raise NotSupported(f"tools[{index}] of type {kind!r} is not supported, only functions", param=f"tools[{index}]")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest(f"tools[{index}].function has no name", param=f"tools[{index}].function")
    if not isinstance(function.get("parameters") or {}, dict):
        where = f"tools[{index}].function.parameters"
        raise InvalidRequest(f"{where} is not a JSON schema in the form of an object", param=where)
    return function


def _allowed(choice: str | dict[str, Any] | None, schemas: Mapping[str, object]) -> frozenset[str]:
    """Return the names that may be called. Raises NotSupported for a choice that forces a call."""
    if choice in (None, "auto", "none"):
        return frozenset(schemas)
    if choice == "required":
        raise NotSupported(f'tool_choice "required" is not supported yet: {_NOT_FORCED}', param="tool_choice")
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in schemas:
                raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
            raise NotSupported(
                f"tool_choice with a named function is not supported yet: {_NOT_FORCED}", param="tool_choice"
            )
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": list(listed)}}:
            names = frozenset(tool.get("function", {}).get("name") for tool in listed if isinstance(tool, dict))
            if not names or not names <= schemas.keys():
                raise InvalidRequest("tool_choice allows a tool that is not among the tools", param="tool_choice")
            return names
        case {"type": "allowed_tools", "allowed_tools": {"mode": "required"}}:
            raise NotSupported(
                f'tool_choice with mode "required" is not supported yet: {_NOT_FORCED}', param="tool_choice"
            )
    raise InvalidRequest(
        'tool_choice must be "auto", "none", "required", a function or allowed_tools', param="tool_choice"
    )
