"""Names the fields inside content blocks of the Messages API that this server does not know, for the `Warning` header."""

from collections.abc import Iterator, Mapping
from typing import Any

from runtime.api.anthropic.types import PromptBody
from runtime.api.openai.content_parts import unknown_in_parts

# `cache_control` marks where a cached prefix ends; every prefix is cached here. `caller` says who made a call, `citations` what a text quotes.
_FIELDS: Mapping[str, frozenset[str]] = {
    "text": frozenset({"type", "text", "cache_control", "citations"}),
    "thinking": frozenset({"type", "thinking", "signature"}),
    "redacted_thinking": frozenset({"type", "data"}),
    "tool_use": frozenset({"type", "id", "name", "input", "cache_control", "caller"}),
    "tool_result": frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"}),
}


def unknown_in_blocks(body: PromptBody) -> Iterator[str]:
    """Yield the paths of unknown fields in the system prompt, the messages, and the results of tools inside them."""
    yield from unknown_in_parts("system", body.system, _FIELDS)
    for index, turn in enumerate(body.messages):
        path = f"messages.{index}.content"
        yield from unknown_in_parts(path, turn.content, _FIELDS)
        blocks: list[dict[str, Any]] = turn.content if isinstance(turn.content, list) else []
        for position, block in enumerate(blocks):
            if block.get("type") == "tool_result":
                yield from unknown_in_parts(f"{path}.{position}.content", block.get("content"), _FIELDS)
