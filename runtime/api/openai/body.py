"""Parses a JSON body into a typed request: names the field of an error, lists unknown fields, refuses unsupported features."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from runtime.api.openai.types import ChatBody, CompletionBody, Shared
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

    def with_unknown(self, names: Iterable[str]) -> "Parsed[_T]":
        """Return the body with further names of fields that are ignored."""
        added = tuple(names)
        return replace(self, unknown=(*self.unknown, *added)) if added else self

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
        body = _decode(raw, kind)
        names = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
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
    return Parsed(body, tuple(_unknown(names, kind, "")))


def _unknown(fields: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct], path: str) -> Iterator[str]:
    """Yield the paths of fields, of the struct or of those inside it, that it lacks and that are not null."""
    inside = _structs_in(kind)
    for name, value in fields.items():
        if name not in kind.__struct_encode_fields__:
            if bytes(value) != b"null":
                yield f"{path}{name}"
        elif (inner := inside.get(name)) is not None:
            begin = bytes(value)[:1]
            if begin == b"{":
                yield from _unknown(_fields(value), inner, f"{path}{name}.")
            elif begin == b"[":
                for index, item in enumerate(msgspec.json.decode(value, type=list[msgspec.Raw])):
                    if bytes(item)[:1] == b"{":
                        yield from _unknown(_fields(item), inner, f"{path}{name}.{index}.")


def _fields(value: msgspec.Raw) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(value, type=dict[str, msgspec.Raw])


@functools.cache
def _structs_in(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    """Return the struct of each field that is one, or a list of them, by the field's name in JSON."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    found = ((field.encode_name, _struct_of(field.type)) for field in described.fields)
    return {name: struct for name, struct in found if struct is not None}


def _struct_of(described: inspect.Type) -> type[msgspec.Struct] | None:
    match described:
        case inspect.StructType():
            return described.cls
        case inspect.ListType():
            return _struct_of(described.item_type)
        case inspect.UnionType():
            return next((struct for each in described.types if (struct := _struct_of(each)) is not None), None)
    return None


def _decode(raw: bytes, kind: type[_T]) -> _T:
    """Decode strictly, except that a whole number may be written as 1.0 or 1e3 where an integer is expected, as in JSON schema."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        try:
            value = msgspec.json.decode(raw)
        except msgspec.ValidationError:  # such as a number out of range, which only the first error gives a name
            raise error from None
        return msgspec.convert(_with_integers(value), kind)


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
