"""Streams one answer of the OpenAI chat API to the terminal, with the progress of the model's load before it."""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.client.admin import AdminClient
from mesh.errors import MeshError

_CLEAR_LINE = "\r\033[K"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered. Times are seconds after the request; the token counts are 0 if the server sent none."""

    text: str
    first_s: float
    total_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0

    def statistics(self) -> str:
        """Return two lines with tokens and rates. The rate is that after the first token, which includes the prompt's computation."""
        seconds = self.total_s - self.first_s
        rate = (
            f", {(self.output_tokens - 1) / seconds:.1f} tokens per second"
            if self.output_tokens > 1 and seconds
            else ""
        )
        return (
            f"prompt  {self.prompt_tokens} tokens, first token after {self.first_s:.2f} s\n"
            f"answer  {self.output_tokens} tokens in {self.total_s:.2f} s{rate}"
        )


def stream_answer(client: AdminClient, body: Mapping[str, Any]) -> Answer:
    """Print the answer to a chat request while it is generated. Raises MeshError, also for an error in the middle of the stream."""
    started_s = time.monotonic()
    first_s = 0.0
    usage: dict[str, int] = {}
    parts: list[str] = []
    is_status_shown = False
    events = client.events("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    try:
        for kind, text in events:
            if kind == "comment":
                if sys.stderr.isatty():
                    print(f"{_CLEAR_LINE}{text}", end="", file=sys.stderr, flush=True)
                    is_status_shown = True
                continue
            if is_status_shown:
                print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
                is_status_shown = False
            event = json.loads(text)
            if "error" in event:
                raise MeshError(str(event["error"].get("message", event["error"])))
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                if piece := choice.get("delta", {}).get("content") or "":
                    first_s = first_s or time.monotonic() - started_s
                    parts.append(piece)
                    print(piece, end="", flush=True)
    finally:
        # An error message or the shell's prompt must begin on a line of its own.
        if is_status_shown:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
        if parts:
            print()
    return Answer(
        "".join(parts),
        first_s,
        time.monotonic() - started_s,
        usage.get("prompt_tokens", 0),
        usage.get("completion_tokens", 0),
    )
