"""Turns a request of the Messages API into an OpenAI chat."""

from collections.abc import Iterator
from typing import Any

from runtime.api.anthropic.types import Blocks, MessagesBody, PromptBody, Turn
from runtime.api.openai.types import ChatBody, ChatTurn, HistoryCall, HistoryFunction
from runtime.errors import InvalidRequest, NotSupported
from runtime.text.chat import thinking_variables

_UNSUPPORTED = (
    "image", "document", "search_result", "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "mcp_tool_use", "mcp_tool_result", "container_upload",
    "tool_search_tool_result", "tool_reference",
)  # fmt: skip


def as_chat(body: PromptBody) -> ChatBody:
    """Return the chat. Raises InvalidRequest or NotSupported naming the field."""
    turns = [] if body.system is None else [ChatTurn("system", _text("system", body.system))]
    for index, turn in enumerate(body.messages):
        turns += _turns(f"messages[{index}]", turn)
    thinking = (body.thinking or {}).get("type")
    choice = body.tool_choice or {}
    request = body if isinstance(body, MessagesBody) else None
    return ChatBody(
        model=body.model,
        messages=turns,
        tools=[_tool(index, tool) for index, tool in enumerate(body.tools or ())] or None,
        tool_choice=_choice(choice),
        parallel_tool_calls=False if choice.get("disable_parallel_tool_use") is True else None,
        thinking_token_budget=_budget(body.thinking or {}),
        chat_template_kwargs=None if thinking is None else thinking_variables(thinking != "disabled"),
        max_tokens=request.max_tokens if request else None,
        stream=request.stream if request else None,
        stop=request.stop_sequences if request else None,
        temperature=request.temperature if request else None,
        top_p=request.top_p if request else None,
        top_k=request.top_k if request else None,
        response_format=_response_format(body),
    )


def _budget(thinking: dict[str, Any]) -> int | None:
    budget = thinking.get("budget_tokens")
    if thinking.get("type") != "enabled" or budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise InvalidRequest("thinking.budget_tokens must be an integer", param="thinking.budget_tokens")
    return budget


def _response_format(body: PromptBody) -> dict[str, Any] | None:
    """Return the schema of `output_config.format` or of the older `output_format`, which the protocol always enforces."""
    match (body.output_config or {}).get("format") if body.output_format is None else body.output_format:
        case None:
            return None
        case {"type": "json_schema", "schema": dict(schema)}:
            return {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}
    raise InvalidRequest(
        "output_config.format must have the type json_schema and a schema", param="output_config.format"
    )


def _turns(where: str, turn: Turn) -> Iterator[ChatTurn]:
    """Yield a turn's messages: results of tools become messages of their own, in front of the turn's text."""
    if turn.role not in ("user", "assistant", "system"):
        raise InvalidRequest(f"{where}.role must be user, assistant or system, got {turn.role!r}", param=where)
    if isinstance(turn.content, str):
        yield ChatTurn(turn.role, turn.content)
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[HistoryCall] = []
    num_results = 0
    for position, block in enumerate(turn.content):
        place = f"{where}.content[{position}]"
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                thoughts.append(text)
            case {"type": "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(arguments)}:
                calls.append(HistoryCall(HistoryFunction(name, arguments), call_id))
            case {"type": "tool_result", "tool_use_id": str(call_id)}:
                num_results += 1
                yield ChatTurn("tool", _text(f"{place}.content", block.get("content") or ""), tool_call_id=call_id)
            case _:
                raise _refusal(place, block)
    if texts or calls or thoughts or not num_results:
        yield ChatTurn(
            turn.role,
            "\n".join(texts) if texts or not calls else None,
            reasoning_content="\n".join(thoughts) or None,
            tool_calls=calls or None,
        )


def _text(where: str, blocks: Blocks) -> str:
    if isinstance(blocks, str):
        return blocks
    texts: list[str] = []
    for index, block in enumerate(blocks):
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise _refusal(f"{where}[{index}]", block)
    return "\n".join(texts)


def _refusal(where: str, block: dict[str, Any]) -> InvalidRequest | NotSupported:
    kind = block.get("type")
    if kind in ("text", "thinking", "tool_use", "tool_result"):
        return InvalidRequest(f"{where} of type {kind!r} lacks a field or has one of another type", param=where)
    if kind not in _UNSUPPORTED:
        return InvalidRequest(f"{where}.type {kind!r} does not exist", param=where)
    return NotSupported(f"{where}: content of type {kind!r} is not supported, only text and tools", param=where)


def _tool(index: int, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type", "custom")
    if kind != "custom":
        raise NotSupported(f"tools[{index}] of type {kind!r} is not supported: it runs on the server", param="tools")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description") or "",
        "parameters": tool.get("input_schema") or {},
    }
    return {"type": "function", "function": function}


def _choice(choice: dict[str, Any]) -> str | dict[str, Any] | None:
    match choice.get("type"):
        case None | "auto" | "none" as kind:
            return kind
        case "any":
            return "required"
        case "tool":
            return {"type": "function", "function": {"name": str(choice.get("name", ""))}}
    raise InvalidRequest("tool_choice.type must be auto, any, tool or none", param="tool_choice")
