"""Implements `repertory run` on the OpenAI chat API: one streamed answer, or a conversation in the terminal."""

import contextlib
import json
import sys
from dataclasses import dataclass

from mesh.client.admin import AdminClient
from mesh.errors import MeshError

_HELP = "/clear starts a new conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Options:
    max_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None
    seed: int | None = None


def answer(client: AdminClient, name: str, prompt: str, options: Options) -> int:
    """Print one answer while it is generated."""
    _stream(client, name, [*_opening(options), {"role": "user", "content": prompt}], options)
    return 0


def answer_as_json(client: AdminClient, name: str, prompt: str, options: Options) -> int:
    """Print the API's response as JSON."""
    body = _body(name, [*_opening(options), {"role": "user", "content": prompt}], options)
    print(json.dumps(json.loads(client.call("POST", "/v1/chat/completions", body)), indent=2, ensure_ascii=False))
    return 0


def converse(client: AdminClient, name: str, options: Options) -> int:
    """Hold a conversation until the user ends it. A turn that fails is reported and dropped from the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives `input` arrow keys and a history
    print(f"talking to {name}; {_HELP}")
    messages = _opening(options)
    while True:
        try:
            line = input("\n>>> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/bye", "/exit", "/quit"):
            return 0
        if line == "/clear":
            messages = _opening(options)
            continue
        if line.startswith("/") or not line:
            print(_HELP)
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _stream(client, name, messages, options)})
        except KeyboardInterrupt:
            print("(stopped)")
            messages.pop()
        except MeshError as error:
            print(error.message, file=sys.stderr)
            messages.pop()


def _opening(options: Options) -> list[dict[str, str]]:
    return [{"role": "system", "content": options.system}] if options.system else []


def _body(name: str, messages: list[dict[str, str]], options: Options) -> dict[str, object]:
    given = {
        key: value for key in ("max_tokens", "temperature", "seed") if (value := getattr(options, key)) is not None
    }
    return {"model": name, "messages": messages, **given}


def _stream(client: AdminClient, name: str, messages: list[dict[str, str]], options: Options) -> str:
    body = {**_body(name, messages, options), "stream": True}
    parts: list[str] = []
    waiting = False
    try:
        for kind, text in client.events("/v1/chat/completions", body):
            if kind == "comment":
                if sys.stderr.isatty():
                    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
                    waiting = True
                continue
            if waiting:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
                waiting = False
            event = json.loads(text)
            if "error" in event:
                raise MeshError(str(event["error"].get("message", event["error"])))
            for choice in event.get("choices", []):
                piece = choice.get("delta", {}).get("content") or ""
                parts.append(piece)
                print(piece, end="", flush=True)
    finally:
        # An error message or the shell's prompt must begin on a line of its own.
        if waiting:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if any(parts):
            print()
    return "".join(parts)
