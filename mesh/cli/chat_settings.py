"""The settings of a conversation in the terminal, and the commands `/set` and `/show` that change and print them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mesh.errors import InvalidRequest

PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed")
# Which values are integers in the API.
_INTEGERS = frozenset({"top_k", "max_tokens", "seed"})
_SET_HELP = f"/set system TEXT, /set verbose, /set quiet, or /set NAME NUMBER with a NAME of {', '.join(PARAMETERS)}"


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`parameters` holds the sampling parameters that the user chose, under their names in the API."""

    system: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)
    verbose: bool = False

    def opening(self) -> list[dict[str, str]]:
        """Return the messages with which a conversation begins."""
        return [{"role": "system", "content": self.system}] if self.system else []


def with_command(settings: ChatSettings, words: str) -> ChatSettings:
    """Return the settings after `/set WORDS`. Raises InvalidRequest for words that set nothing."""
    name, _, value = words.strip().partition(" ")
    value = value.strip()
    if name == "parameter":  # Ollama's spelling
        return with_command(settings, value)
    if name in ("verbose", "quiet") and not value:
        return replace(settings, verbose=name == "verbose")
    if name == "system":
        return replace(settings, system=value.strip('"'))
    if name in PARAMETERS and value:
        return replace(settings, parameters={**settings.parameters, name: number(name, value)})
    raise InvalidRequest(f"/set {words.strip()}: expected {_SET_HELP}")


def number(name: str, text: str) -> float:
    """Return the value of a sampling parameter. Raises InvalidRequest for an unknown name and for text that is not a number."""
    if name not in PARAMETERS:
        raise InvalidRequest(f"sampling parameter {name!r} is unknown; known: {', '.join(PARAMETERS)}")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, bool) or not isinstance(value, int if name in _INTEGERS else int | float):
        kind = "an integer" if name in _INTEGERS else "a number"
        raise InvalidRequest(f"{name} {text}: expected {kind}")
    return value


def describe(settings: ChatSettings) -> str:
    """Return what `/show` prints: the system prompt and the parameters, one per line."""
    lines = [f"system  {settings.system or '(none)'}"]
    lines += [f"{name}  {value:g}" for name, value in settings.parameters.items()]
    if not settings.parameters:
        lines.append("parameters  those of the registration and the checkpoint")
    return "\n".join(lines)
