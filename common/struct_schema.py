"""Describes the fields of a msgspec struct: help text, choices and ranges, for flags, tables and error messages."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `about` is its description, `allowed` says in words what it takes, `fields` are those of a nested struct.

    With `is_integer` and `choices`, it takes a number or one of the words.
    """

    name: str
    about: str
    default: Any
    type: Any
    allowed: str
    choices: tuple[str, ...] = ()
    is_integer: bool = False
    is_number: bool = False
    fields: "tuple[Field, ...]" = ()


@cache
def fields_of(kind: type[msgspec.Struct]) -> tuple[Field, ...]:
    """Describe the fields of a struct in their order. Reading a struct's types takes milliseconds, so the result is kept."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    described = []
    for declared, field in zip(msgspec.structs.fields(kind), info.fields, strict=True):
        about = ""
        type_info = field.type
        if isinstance(type_info, msgspec.inspect.Metadata):
            about = str((type_info.extra_json_schema or {}).get("description", ""))
            type_info = type_info.type
        options = _options(type_info)
        nested = next((option for option in options if isinstance(option, msgspec.inspect.StructType)), None)
        described.append(
            Field(
                name=declared.name,
                about=about,
                default=declared.default if declared.default is not msgspec.NODEFAULT else declared.default_factory,
                type=declared.type,
                allowed=" or ".join(_allowed(option) for option in options),
                choices=tuple(choice for option in options for choice in _choices(option)),
                is_integer=any(isinstance(option, msgspec.inspect.IntType) for option in options),
                is_number=isinstance(options[0], msgspec.inspect.FloatType),
                fields=fields_of(nested.cls) if nested is not None else (),
            )
        )
    return tuple(described)


def _options(info: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    """Return the alternatives of a type without None."""
    if not isinstance(info, msgspec.inspect.UnionType):
        return [info]
    return [option for option in info.types if not isinstance(option, msgspec.inspect.NoneType)]


def _choices(info: msgspec.inspect.Type) -> tuple[str, ...]:
    if isinstance(info, msgspec.inspect.EnumType):
        return tuple(str(member.value) for member in info.cls)
    if isinstance(info, msgspec.inspect.LiteralType):
        return tuple(str(value) for value in info.values)
    return ()


def _allowed(info: msgspec.inspect.Type) -> str:
    match info:
        case msgspec.inspect.EnumType() | msgspec.inspect.LiteralType():
            return f"one of {', '.join(_choices(info))}"
        case msgspec.inspect.IntType() | msgspec.inspect.FloatType():
            kind = "an integer" if isinstance(info, msgspec.inspect.IntType) else "a number"
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (("at least", info.ge), ("above", info.gt), ("at most", info.le))
                if bound is not None
            ]
            return " ".join((kind, " and ".join(bounds))).strip()
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.StrType():
            return "a string"
        case msgspec.inspect.StructType():
            return "an object of numbers"
        case _:
            return "an object of strings"
