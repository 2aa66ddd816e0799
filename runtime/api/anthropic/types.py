"""The request bodies of Anthropic's Messages API."""

from typing import Any

import msgspec

Blocks = str | list[dict[str, Any]]


class Turn(msgspec.Struct, frozen=True):
    role: str
    content: Blocks


class PromptBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that make the prompt: all of a request to count tokens."""

    model: str = ""
    messages: list[Turn]
    system: Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    # accepted without effect
    metadata: Any = None
    service_tier: Any = None
    cache_control: Any = None
    # `format` has a JSON schema; the rest is accepted without effect
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


class MessagesBody(PromptBody, frozen=True, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
