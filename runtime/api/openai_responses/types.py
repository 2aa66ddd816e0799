"""The request body of OpenAI's Responses API."""

from typing import Any

import msgspec

Input = str | list[dict[str, Any]]


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    """`input` is a user's text, or items: messages, calls, outputs of calls and reasoning."""

    model: str = ""
    input: Input
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    # accepted without effect
    include: Any = None
    user: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    client_metadata: Any = None
    max_tool_calls: Any = None
    stream_options: Any = None
    # refused
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    top_logprobs: int | None = None
    truncation: str | None = None
