"""Turns a request of the Responses API into an OpenAI chat."""

from typing import Any

import msgspec

from runtime.api.openai.content_parts import unknown_in_parts, unknown_names
from runtime.api.openai.types import ChatBody, ChatTurn, HistoryCall, HistoryFunction
from runtime.api.openai_responses.types import ResponsesBody
from runtime.errors import InvalidRequest, NotSupported

_LOGPROBS = "message.output_text.logprobs"
_ITEM_FIELDS = frozenset(
    {
        "type", "id", "status", "role", "content", "phase", "call_id", "name", "namespace", "arguments", "output", "summary",
        "encrypted_content",
    }
)  # fmt: skip
_STATE = "this server keeps no responses: send all earlier items in input"


def as_chat(body: ResponsesBody) -> ChatBody:
    """Return the chat. Raises InvalidRequest or NotSupported naming the field."""
    _refuse_unsupported(body)
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise InvalidRequest(f"max_output_tokens must be >= 1, got {body.max_output_tokens}", param="max_output_tokens")
    if body.input == [] and body.instructions is None:
        raise InvalidRequest("input is empty: it needs a text or at least one item", param="input")
    turns = [] if body.instructions is None else [ChatTurn("system", body.instructions)]
    turns += [ChatTurn("user", body.input)] if isinstance(body.input, str) else _turns(body.input)
    return ChatBody(
        model=body.model,
        messages=turns or [ChatTurn("user", "")],
        tools=[_tool(tool) for tool in body.tools or () if tool.get("type") == "function"] or None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        reasoning_effort=(body.reasoning or {}).get("effort"),
        response_format=_response_format((body.text or {}).get("format")),
    )


def notes_of(body: ResponsesBody) -> tuple[str, ...]:
    """Return what the `Warning` header says about things that agents always send, and that have no effect here."""
    notes = []
    if any(tool.get("type") != "function" for tool in body.tools or ()):
        notes.append("tools other than functions were ignored")
    if body.include:
        notes.append("include was ignored: there is nothing to add to the output")
    if (body.text or {}).get("verbosity") is not None:
        notes.append("text.verbosity was ignored")
    return tuple(notes)


def unknown_in_items(body: ResponsesBody) -> list[str]:
    """Return the paths of fields inside items that the API does not have."""
    items = [] if isinstance(body.input, str) else body.input
    found: list[str] = []
    for index, item in enumerate(items):
        path = f"input.{index}"
        found += (f"{path}.{name}" for name in unknown_names(item, _ITEM_FIELDS))
        for field in ("content", "output", "summary"):
            found += unknown_in_parts(f"{path}.{field}", item.get(field))
    return found


def _refuse_unsupported(body: ResponsesBody) -> None:
    for name in ("previous_response_id", "conversation", "store", "background", "prompt"):
        if getattr(body, name):
            raise NotSupported(f"{name} is not supported: {_STATE}", param=name)
    if isinstance(body.include, list) and _LOGPROBS in body.include:
        raise NotSupported(f"include {_LOGPROBS} is not supported: use /v1/chat/completions", param="include")
    if body.top_logprobs:
        raise NotSupported("top_logprobs is not supported: use /v1/chat/completions", param="top_logprobs")
    if body.truncation not in (None, "disabled"):
        raise NotSupported(
            f"truncation {body.truncation!r} is not supported: leave items out of input", param="truncation"
        )


def _response_format(given: Any) -> Any:
    """Return `text.format` in the form of a chat's `response_format`."""
    match given:
        case None | {"type": "text" | "json_object"}:
            return given
        case {"type": "json_schema", "schema": dict(), **rest}:
            return {"type": "json_schema", "json_schema": {"schema": given["schema"], **rest}}
    raise InvalidRequest(
        "text.format must have the type text, json_object, or json_schema with a schema", param="text.format"
    )


def _turns(items: list[dict[str, Any]]) -> list[ChatTurn]:
    """Return the items as messages: what the assistant did between two messages of others becomes one message."""
    turns: list[ChatTurn] = []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item:
            case {"role": "assistant", "content": content}:
                _extend(turns, ChatTurn("assistant", _text(where, content)))
            case {"role": str(role), "content": content} if item.get("type", "message") == "message":
                turns.append(ChatTurn(role, _text(where, content)))
            case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
                call = HistoryCall(HistoryFunction(name, arguments), call_id)
                _extend(turns, ChatTurn("assistant", tool_calls=[call]))
            case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
                turns.append(ChatTurn("tool", _text(where, output), tool_call_id=call_id))
            case {"type": "reasoning"}:
                thoughts = _text(where, item.get("content") or item.get("summary") or "")
                if thoughts:
                    _extend(turns, ChatTurn("assistant", reasoning_content=thoughts))
            case {"type": "message" | "function_call" | "function_call_output"}:
                raise InvalidRequest(f"{where} lacks a field or has one of another type", param=where)
            case {"type": str(kind)}:
                raise NotSupported(f"{where} of type {kind!r} is not supported, only text and functions", param=where)
            case _:
                raise InvalidRequest(f"{where} has neither a role with content nor a type", param=where)
    return turns


def _extend(turns: list[ChatTurn], more: ChatTurn) -> None:
    """Add to the assistant's message at the end, or begin one."""
    last = turns[-1] if turns and turns[-1].role == "assistant" else None
    if last is None:
        turns.append(more)
        return
    turns[-1] = msgspec.structs.replace(
        last,
        content=_joined(last.content, more.content),
        reasoning_content=_joined(last.reasoning_content, more.reasoning_content),
        tool_calls=[*(last.tool_calls or ()), *(more.tool_calls or ())] or None,
    )


def _joined(first: Any, second: Any) -> str | None:
    texts = [text for text in (first, second) if text]
    return "\n".join(texts) if texts else None


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for index, part in enumerate(content if isinstance(content, list) else [content]):
        match part:
            case {"type": "input_text" | "output_text" | "reasoning_text" | "summary_text" | "text", "text": str(text)}:
                texts.append(text)
            case {"type": "refusal", "refusal": str(text)}:
                texts.append(text)
            case {"type": "input_image" | "input_file" | "input_audio" as kind}:
                raise NotSupported(
                    f"{where}.content[{index}] of type {kind!r} is not supported, only text", param=where
                )
            case _:
                raise InvalidRequest(f"{where} has content that is neither a string nor a list of parts", param=where)
    return "\n".join(texts)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: tool[name] for name in ("name", "description", "parameters", "strict") if name in tool}
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": str(mode), "tools": list(tools)}:
            named = [_tool(tool) for tool in tools if isinstance(tool, dict)]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    return choice
