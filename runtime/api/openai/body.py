"""Parses a JSON body into a typed request: names the field of an error, lists unknown fields, refuses unsupported features."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from runtime.api.openai.types import ChatBody, ChatTurn, CompletionBody, Shared
from runtime.errors import InvalidRequest, NotSupported

_T = TypeVar("_T", bound=msgspec.Struct)
_PATH = re.compile(r"^(?P<what>.*) - at `\$\.?(?P<path>[^`]*)`$")
_UNSAFE = re.compile(r"[^\w.\-]", re.ASCII)

_REFUSED_SHARED = (
    "store", "structural_tag", "logits_processors", "use_beam_search", "adapter_parameters", "prompt_logprobs",
)  # fmt: skip
_REFUSED_CHAT = ("audio", "prediction")


@dataclass(frozen=True, slots=True)
class Parsed(Generic[_T]):
    """A request body and the names of its fields that this API does not know."""

    body: _T
    unknown: tuple[str, ...]

    @property
    def unknown_names(self) -> str:
        """The first of them, without characters that a header or a log may not have."""
        return ", ".join(_UNSAFE.sub("?", name)[:64] for name in self.unknown[:16])

    @property
    def warning(self) -> str | None:
        """The `Warning` header's value, in RFC 9111's form, if fields were ignored."""
        return self.warning_with(())

    def warning_with(self, notes: tuple[str, ...]) -> str | None:
        """Return the header's value with `notes`, which hold no quotes and no text of the request."""
        texts = ([f"unknown fields were ignored: {self.unknown_names}"] if self.unknown else []) + list(notes)
        return ", ".join(f'299 repertory "{text}"' for text in texts) or None


def parse(raw: bytes, kind: type[_T]) -> Parsed[_T]:
    """Decode a body. Raises InvalidRequest, or NotSupported for a feature that this version does not have, naming the field."""
    try:
        names = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        body = _decode(raw, kind)
    except msgspec.ValidationError as error:
        found = _PATH.match(str(error))
        if found is None or not found["path"]:
            missing = re.search(r"missing required field `(\w+)`", str(error))
            raise InvalidRequest(f"the body is not valid: {error}", param=missing[1] if missing else None) from error
        raise InvalidRequest(f"{found['path']}: {found['what']}", param=found["path"]) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if isinstance(body, Shared):
        refuse_unsupported(body)
    unknown = _unknown(names, kind.__struct_encode_fields__)
    if isinstance(body, ChatBody):
        for index, turn in enumerate(msgspec.json.decode(names["messages"], type=list[dict[str, msgspec.Raw]])):
            unknown += [f"messages.{index}.{name}" for name in _unknown(turn, ChatTurn.__struct_encode_fields__)]
    return Parsed(body, tuple(unknown))


def _unknown(fields: Mapping[str, msgspec.Raw], known: Sequence[str]) -> list[str]:
    """Return the names that `known` lacks, of fields that are not null."""
    return [name for name, value in fields.items() if name not in known and bytes(value) != b"null"]


def _decode(raw: bytes, kind: type[_T]) -> _T:
    """Decode strictly, except that a whole number may be written as 1.0 or 1e3 where an integer is expected, as in JSON schema."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError:
        return msgspec.convert(_with_integers(msgspec.json.decode(raw)), kind)


def _with_integers(value: Any) -> Any:
    """Return the value with integers in place of whole floats."""
    if isinstance(value, dict):
        return {key: _with_integers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refuse_unsupported(body: Shared) -> None:
    """Raise NotSupported for the first field that asks for a missing feature. Null and false ask for nothing, and so does empty, with one exception.

    Raises InvalidRequest for fields that exclude each other.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    for name in _REFUSED_SHARED:
        _refuse(name, getattr(body, name))
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise NotSupported(
            f"best_of={body.best_of} is not supported: only best_of equal to n ({body.n or 1})", param="best_of"
        )
    if isinstance(body, CompletionBody):
        _refuse("suffix", body.suffix)
    if isinstance(body, ChatBody):
        for name in _REFUSED_CHAT:
            _refuse(name, getattr(body, name))
        if body.web_search_options is not None:  # an empty object switches the search on
            raise NotSupported("web_search_options is not supported", param="web_search_options")
        if body.functions:
            raise NotSupported("functions is not supported: send the functions as tools", param="functions")
        if body.function_call not in (None, "none", "auto"):
            raise NotSupported("function_call is not supported: use tools and tool_choice", param="function_call")
        if body.modalities and body.modalities != ["text"]:
            raise NotSupported("modalities other than text are not supported", param="modalities")
        for index, turn in enumerate(body.messages):
            for name in ("function_call", "audio"):
                _refuse(f"messages[{index}].{name}", getattr(turn, name))


def _refuse(name: str, value: Any) -> None:
    if value:
        raise NotSupported(f"{name} is not supported yet", param=name)
