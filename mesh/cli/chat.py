"""Implements `repertory run` on the OpenAI chat API: one streamed answer, or a conversation in the terminal."""

import contextlib
import json
import sys
from typing import Any

from common.units import GIB
from mesh.cli import render
from mesh.cli.answer import stream_answer
from mesh.cli.chat_settings import ChatSettings, describe, with_command
from mesh.client.admin import AdminClient, Model
from mesh.errors import InvalidRequest, MeshError

_QUOTES = '"""'
_HELP = """\
  /set system TEXT     set the system prompt        /show        show the settings
  /set NAME NUMBER     set a sampling parameter     /show info   show the model
  /set verbose|quiet   show tokens per second       /clear       forget the conversation
  \"""                  begin and end a message of several lines
  Ctrl-C stops an answer; Ctrl-D or /bye ends the conversation"""
# Few checkpoints of small models bring sampling defaults. At OpenAI's (temperature 1, all tokens) such models ramble, and without the penalty they
# repeat a sentence without end.
_SMALL_MODEL_BYTES = GIB
_SMALL_MODEL_SAMPLING = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
_DENIED = (401, 403)
_CHOICE_OF_TOKENS = frozenset({"temperature", "top_p", "top_k", "min_p"})


def answer(client: AdminClient, name: str, prompt: str, settings: ChatSettings) -> int:
    """Print one answer while it is generated."""
    _respond(client, name, [*settings.opening(), {"role": "user", "content": prompt}], settings)
    return 0


def answer_as_json(client: AdminClient, name: str, prompt: str, settings: ChatSettings) -> int:
    """Print the API's response as JSON."""
    body = _body(_described(client, name), [*settings.opening(), {"role": "user", "content": prompt}], settings)
    print(json.dumps(json.loads(client.call("POST", "/v1/chat/completions", body)), indent=2, ensure_ascii=False))
    return 0


def converse(client: AdminClient, name: str, settings: ChatSettings) -> int:
    """Hold a conversation until the user ends it. A turn that fails is reported and dropped from the conversation.

    Raises MeshError at once for a name that is not registered. The model is loaded while the user types.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it gives `input` arrow keys and a history
    if _described(client, name).state != "loaded":
        with contextlib.suppress(MeshError):  # the first message reports why
            client.load(name)
    print(f"talking to {name}; /? for help, /bye to end")
    messages = settings.opening()
    while True:
        try:
            line = _read_message()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/bye", "/exit", "/quit"):
            return 0
        if line == "/clear":
            messages = settings.opening()
        elif line.startswith("/set "):
            settings, messages = _set(settings, messages, line.removeprefix("/set "))
        elif line == "/show":
            print(describe(settings))
        elif line == "/show info":
            render.show_model(render.console(), client.model(name))
        elif line.startswith("/") or not line:
            print(_HELP)
        else:
            messages = _take_turn(client, name, messages, line, settings)


def _take_turn(
    client: AdminClient, name: str, messages: list[dict[str, str]], line: str, settings: ChatSettings
) -> list[dict[str, str]]:
    """Return the conversation with the question and its answer, or without both if there was none."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        return [*asked, {"role": "assistant", "content": _respond(client, name, asked, settings)}]
    except KeyboardInterrupt:
        print("(stopped)")
    except MeshError as error:
        print(error.message, file=sys.stderr)
    return messages


def _set(
    settings: ChatSettings, messages: list[dict[str, str]], words: str
) -> tuple[ChatSettings, list[dict[str, str]]]:
    """Return the settings, and the conversation with the new system prompt."""
    try:
        changed = with_command(settings, words)
    except InvalidRequest as error:
        print(error.message, file=sys.stderr)
        return settings, messages
    return changed, [*changed.opening(), *(message for message in messages if message["role"] != "system")]


def _read_message() -> str:
    """Read a line, or the lines from three quotes to three quotes. Raises EOFError at the end of the input."""
    line = input("\n>>> ").strip()
    if not line.startswith(_QUOTES):
        return line
    lines = [line.removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(input("... "))
    return "\n".join(lines).rstrip().removesuffix(_QUOTES).strip("\n")


def _respond(client: AdminClient, name: str, messages: list[dict[str, str]], settings: ChatSettings) -> str:
    spoken = stream_answer(client, _body(_described(client, name), messages, settings))
    if settings.verbose:
        print(spoken.statistics(), file=sys.stderr)
    return spoken.text


def _described(client: AdminClient, name: str) -> Model:
    """Return the model's description; for a key that may not read it, one that leaves all sampling to the server."""
    try:
        return client.model(name)
    except MeshError as error:
        if error.http_status not in _DENIED:
            raise
        return Model(name, weight_bytes=_SMALL_MODEL_BYTES)


def _body(model: Model, messages: list[dict[str, str]], settings: ChatSettings) -> dict[str, Any]:
    registered = model.settings.get("sampling") or {}
    is_chosen = _CHOICE_OF_TOKENS & (settings.parameters.keys() | registered.keys())
    is_small = model.weight_bytes < _SMALL_MODEL_BYTES
    defaults = _SMALL_MODEL_SAMPLING if is_small and not is_chosen else {}
    return {"model": model.name, "messages": messages, **defaults, **settings.parameters}
