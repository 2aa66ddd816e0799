"""The response object of the Responses API and its output items."""

import uuid
from typing import Any

import msgspec

from runtime.api.openai.context import now
from runtime.api.openai.responses import CachedTokens, ReasoningTokens, finish_word, tool_call_id
from runtime.api.openai_responses.types import ResponsesBody
from runtime.generation.parts import Completed
from runtime.interfaces import ServedModel
from runtime.types import FinishReason


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[()] = ()


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class MessageItem(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    content: list[OutputText]
    status: str
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    id: str
    content: list[ReasoningText]
    status: str
    summary: tuple[()] = ()


class CallItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


Item = MessageItem | ReasoningItem | CallItem


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: CachedTokens
    output_tokens_details: ReasoningTokens


class Failure(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: str


class TextFormat(msgspec.Struct, frozen=True):
    type: str = "text"


class TextSettings(msgspec.Struct, frozen=True):
    format: TextFormat = TextFormat()


class Response(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created_at: int
    model: str
    object: str = "response"
    status: str = "in_progress"
    output: list[Item] = []
    usage: ResponseUsage | None = None
    error: Failure | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: dict[str, Any] | None = None
    store: bool = False
    temperature: float | None = None
    text: TextSettings = TextSettings()
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_p: float | None = None
    truncation: str = "disabled"


def begun(body: ResponsesBody, shown_name: str) -> Response:
    """Return the response before its first item, with the request's parameters."""
    return Response(
        id=new_id("resp"),
        created_at=now(),
        model=shown_name,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=body.reasoning,
        temperature=body.temperature,
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_p=body.top_p,
    )


def end_status(model: ServedModel, finish: FinishReason) -> str:
    """Return the status of a response and of its last item. Raises Unavailable if the runtime ended the sequence."""
    return "incomplete" if finish_word(model, finish) == "length" else "completed"


def ended(response: Response, status: str, output: list[Item], usage: ResponseUsage) -> Response:
    """Return the response with its output."""
    return msgspec.structs.replace(
        response,
        status=status,
        incomplete_details=IncompleteDetails("max_output_tokens") if status == "incomplete" else None,
        output=output,
        usage=usage,
    )


def response_usage(num_prompt: int, num_generated: int, num_cached: int, num_reasoning: int) -> ResponseUsage:
    return ResponseUsage(
        num_prompt,
        num_generated,
        num_prompt + num_generated,
        CachedTokens(num_cached),
        ReasoningTokens(num_reasoning),
    )


def whole(response: Response, model: ServedModel, num_prompt: int, result: Completed) -> Response:
    """Return the response of a whole sequence. Raises Unavailable if the runtime ended it."""
    output: list[Item] = []
    if result.reasoning:
        output.append(ReasoningItem(new_id("rs"), [ReasoningText(result.reasoning)], "completed"))
    if result.text or not (result.tool_calls or result.reasoning):
        output.append(MessageItem(new_id("msg"), [OutputText(result.text)], "completed"))
    output += [
        CallItem(new_id("fc"), tool_call_id(call), call.name or "", call.arguments, "completed")
        for call in result.tool_calls
    ]
    status = end_status(model, result.finish)
    output[-1] = msgspec.structs.replace(output[-1], status=status)
    usage = response_usage(num_prompt, len(result.tokens), result.cached_tokens, result.num_reasoning)
    return ended(response, status, output, usage)


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
