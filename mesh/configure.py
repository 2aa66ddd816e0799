"""One typed configuration out of flags, environment and a YAML file: flag beats environment beats file beats default.

Works on any frozen msgspec struct whose fields are annotated with a description. Knows nothing of what the fields mean, except that a name
ending in `_bytes` takes sizes such as `512MiB`, and one ending in `_s` seconds.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from mesh.errors import InvalidRequest

T = TypeVar("T", bound=msgspec.Struct)

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of `123`, `4GiB`, `4G` (both binary) or `4GB` (decimal). Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with KiB, MiB, GiB or TiB")
    number, unit, binary = match.groups()
    decimal = not binary and text.strip().lower().endswith("b") and unit != ""
    return int(float(number) * (1000 if decimal else 1024) ** _POWER[unit.lower()])


def env_name(field: str) -> str:
    return "REPERTORY_" + field.upper()


def is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on")


def add_flags(parser: argparse.ArgumentParser, kind: type[msgspec.Struct], only: frozenset[str] | None = None) -> None:
    """A `--flag` for each field (of `only`), with its description, default and environment variable in the help."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        if only is not None and field.name not in only:
            continue
        kind_of = field.type
        text = ""
        if isinstance(kind_of, msgspec.inspect.Metadata):
            extra = kind_of.extra_json_schema or {}
            text = str(extra.get("description", ""))
            kind_of = kind_of.type
        default = field.default if field.default is not msgspec.NODEFAULT else None
        if field.default_factory is not msgspec.NODEFAULT:
            default = None
        shown = "" if default in (None, "", 0, False, ()) else f" (default {default})"
        flag = "--" + field.name.replace("_", "-").removesuffix("-bytes").removesuffix("-s")
        options: dict[str, Any] = {
            "dest": field.name,
            "default": None,
            "help": f"{text}{shown} [{env_name(field.name)}]".replace("%", "%%"),
        }
        if isinstance(kind_of, msgspec.inspect.BoolType):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag, metavar=_metavar(field.name, kind_of), **options)


def _metavar(name: str, kind: msgspec.inspect.Type) -> str:
    if name.endswith("_bytes"):
        return "SIZE"
    if name.endswith("_s"):
        return "SECONDS"
    if isinstance(kind, msgspec.inspect.IntType):
        return "N"
    if isinstance(kind, msgspec.inspect.FloatType):
        return "X"
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return "A,B,…"
    return "TEXT"


def load(kind: type[T], *, flags: Mapping[str, object], env: Mapping[str, str], file: Path | None = None) -> T:
    """The merged configuration. `flags` holds None for what wasn't given. Raises InvalidRequest naming the source and the field."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    types = {field.name: field.type for field in info.fields}
    merged: dict[str, object] = {}
    if file is not None:
        merged.update(_from_file(file, types))
    for name, kind_of in types.items():
        if (text := env.get(env_name(name))) is not None:
            merged[name] = _read(f"environment variable {env_name(name)}", name, kind_of, text)
        if (given := flags.get(name)) is not None:
            merged[name] = _read(f"flag for {name}", name, kind_of, given)
    try:
        return msgspec.convert(merged, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"configuration: {error}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Empty for an empty file. Raises InvalidRequest naming the file, also for one that holds no mapping."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InvalidRequest(f"configuration file {file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"configuration file {file}: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequest(f"configuration file {file}: expected `name: value` lines")
    return content


def _from_file(file: Path, types: Mapping[str, msgspec.inspect.Type]) -> dict[str, object]:
    content = read_yaml(file)
    unknown = sorted(str(name) for name in set(content) - set(types))
    if unknown:
        raise InvalidRequest(
            f"configuration file {file}: unknown field {unknown[0]!r}; known: {', '.join(sorted(types))}"
        )
    return {
        name: _read(f"configuration file {file}, {name}", name, types[name], value) for name, value in content.items()
    }


def _read(source: str, name: str, kind: msgspec.inspect.Type, value: object) -> object:
    if isinstance(kind, msgspec.inspect.Metadata):
        kind = kind.type
    if not isinstance(value, str):
        return value
    if name.endswith("_bytes"):
        try:
            return parse_size(value)
        except ValueError as error:
            raise InvalidRequest(f"{source}: {error}") from None
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(kind, msgspec.inspect.BoolType):
        return is_true(value)
    return value
