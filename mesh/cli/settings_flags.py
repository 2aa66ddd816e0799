"""Command-line flags for the settings of a model, one for each setting that a registration may give."""

import argparse
import json
from typing import Any

from common.model_key import registrable_fields
from common.struct_schema import Field
from mesh.errors import InvalidRequest

# Settings whose text is often a file: @FILE reads it.
_MAYBE_FILE = frozenset({"chat_template"})


def add_flags(parser: argparse.ArgumentParser) -> None:
    for field in registrable_fields():
        parser.add_argument(flag_of(field), dest=field.name, default=None, help=_help(field), **_action(field))


def flag_of(field: Field) -> str:
    """Return the flag's name. A mapping is given pair by pair, so its flag is in the singular."""
    name = field.name.removesuffix("s") if _is_mapping(field) else field.name
    return f"--{name.replace('_', '-')}"


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings on the command line as a registration has them. Raises InvalidRequest for text that cannot be read."""
    settings = {}
    for field in registrable_fields():
        value = getattr(args, field.name)
        if value is None:
            continue
        if field.fields:
            value = _numbers(field.name, value)
        elif _is_mapping(field):
            value = pairs(value)
        elif field.name in _MAYBE_FILE and value.startswith("@"):
            value = _read(field.name, value[1:])
        settings[field.name] = value
    return settings


def _action(field: Field) -> dict[str, Any]:
    if field.default is False:
        return {"action": "store_true"}
    if field.is_integer and field.choices:
        return {"type": _integer_or_word, "metavar": f"N|{'|'.join(field.choices)}"}
    if field.choices:
        return {"choices": field.choices}
    if field.fields:
        return {"action": "append", "metavar": "NAME=NUMBER"}
    if _is_mapping(field):
        return {"action": "append", "metavar": "KEY=VALUE"}
    if field.is_integer:
        return {"type": int, "metavar": "N"}
    if field.is_number:
        return {"type": float, "metavar": "NUMBER"}
    return {"metavar": "TEXT|@FILE" if field.name in _MAYBE_FILE else "TEXT"}


def _help(field: Field) -> str:
    names = f" ({', '.join(nested.name for nested in field.fields)})" if field.fields else ""
    return (field.about + names).replace("%", "%%")


def _is_mapping(field: Field) -> bool:
    return field.default is dict


def _integer_or_word(text: str) -> int | str:
    """Return a number if the text is one; the server checks other words."""
    return int(text) if text.lstrip("-").isdigit() else text


def _read(name: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - a user's path, read once
            return file.read()
    except OSError as error:
        raise InvalidRequest(f"{name} {path}: {error.strerror}") from None


def pairs(values: list[str]) -> dict[str, str]:
    """Return the values of `KEY=VALUE` words. Raises InvalidRequest for a word without `=`."""
    found = {}
    for value in values:
        key, separator, text = value.partition("=")
        if not separator:
            raise InvalidRequest(f"{value!r}: expected KEY=VALUE")
        found[key] = text
    return found


def _numbers(name: str, values: list[str]) -> dict[str, Any]:
    numbers = {}
    for key, text in pairs(values).items():
        try:
            numbers[key] = json.loads(text)
        except ValueError:
            raise InvalidRequest(f"{name} default {key}={text}: expected a number") from None
    return numbers
