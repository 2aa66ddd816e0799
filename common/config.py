"""Loads one typed configuration: a flag overrides an environment variable, which overrides the file, which overrides the default.

A configuration is a frozen msgspec struct whose fields are annotated with a description. A field that is itself a struct is a section of the
file. Names that end in `_bytes` take sizes such as `512MiB`, and names that end in `_s` take seconds.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml
from msgspec.inspect import BoolType, IntType, Metadata, StructType, Type, VarTupleType

from common.errors import ConfigError
from common.units import format_size, parse_size

T = TypeVar("T", bound=msgspec.Struct)

BARE_FLAG = "bare_flag"
"""Key of a field's extra annotation: the value of its flag when it is given without one."""

_CLIENT_VARIABLES = frozenset({"REPERTORY_SERVER", "REPERTORY_API_KEY"})
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_|$)")

_Fields = dict[str, msgspec.inspect.Field]


def env_name(field: str) -> str:
    return f"REPERTORY_{field.upper()}"


def is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on")


def unknown_variables(env: Mapping[str, str], kind: type[msgspec.Struct]) -> list[str]:
    """Return the REPERTORY_ variables that set no field of `kind`.

    The command line's own variables are left out, and those that Kubernetes sets for a service named `repertory`.
    """
    known = {env_name(name) for name in _names(kind)} | _CLIENT_VARIABLES
    return sorted(
        name for name in env if name.startswith(env_name("")) and name not in known and not _SERVICE_LINK.search(name)
    )


def _names(kind: type[msgspec.Struct]) -> Iterator[str]:
    for name, field in _fields(kind).items():
        if section := _section(field):
            yield from _names(section)
        else:
            yield name


def add_flags(parser: argparse.ArgumentParser, kind: type[msgspec.Struct]) -> None:
    """Add a `--flag` per field, with description, default and environment variable in the help. A section becomes a group."""
    plain = parser.add_argument_group(kind.__name__.removesuffix("Config").lower())
    for name, field in _fields(kind).items():
        if section := _section(field):
            group = parser.add_argument_group(name)
            for inner_name, inner in _fields(section).items():
                _add_flag(group, inner_name, inner)
        else:
            _add_flag(plain, name, field)


def load(kind: type[T], *, flags: Mapping[str, object], env: Mapping[str, str], file: Path | str | None = None) -> T:
    """Merge the sources. `flags` holds None for a flag that was not given; `file` is a path, or JSON text.

    Raises ConfigError naming the source and the field.
    """
    content = read_mapping(file) if file is not None else {}
    try:
        return msgspec.convert(_merge(kind, content, env, flags, f"configuration file {file}"), kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"configuration: {error}") from None


def read_mapping(file: Path | str) -> dict[str, Any]:
    """Read a YAML or JSON file, or JSON text. An empty file is an empty mapping. Raises ConfigError naming the file."""
    is_text = isinstance(file, str) and file.lstrip().startswith("{")
    where = "configuration" if is_text else f"configuration file {file}"
    try:
        text = str(file) if is_text else Path(file).read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected `name: value` lines")
    return content


def _merge(
    kind: type[msgspec.Struct],
    content: Mapping[str, object],
    env: Mapping[str, str],
    flags: Mapping[str, object],
    file: str,
) -> dict[str, object]:
    fields = _fields(kind)
    unknown = sorted(str(name) for name in set(content) - set(fields))
    if unknown:
        raise ConfigError(f"{file}: unknown field {unknown[0]!r}; known: {', '.join(sorted(fields))}")
    merged: dict[str, object] = {}
    for name, field in fields.items():
        if section := _section(field):
            inner = content.get(name) or {}
            if not isinstance(inner, dict):
                raise ConfigError(f"{file}: `{name}:` must hold `field: value` lines")
            merged[name] = _merge(section, inner, env, flags, f"{file}, {name}")
            continue
        for source, value in _sources(name, content, env, flags, file):
            merged[name] = _value(source, name, field, value)
    return merged


def _sources(
    name: str, content: Mapping[str, object], env: Mapping[str, str], flags: Mapping[str, object], file: str
) -> Iterator[tuple[str, object]]:
    """Yield what each source says about a field, the strongest source last."""
    if name in content:
        yield f"{file}, {name}", content[name]
    if (text := env.get(env_name(name))) is not None:
        yield f"environment variable {env_name(name)}", text
    if (given := flags.get(name)) is not None:
        yield f"flag for {name}", ",".join(map(str, given)) if isinstance(given, list | tuple) else given


def _value(source: str, name: str, field: msgspec.inspect.Field, value: object) -> object:
    if not isinstance(value, str):
        return value
    kind, _ = _unwrap(field.type)
    if name.endswith("_bytes"):
        try:
            return parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
    if isinstance(kind, VarTupleType):
        return [part.strip() for part in value.split(",") if part.strip()]
    return is_true(value) if isinstance(kind, BoolType) else value


def _fields(kind: type[msgspec.Struct]) -> _Fields:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, StructType)
    return {field.name: field for field in info.fields}


def _section(field: msgspec.inspect.Field) -> type[msgspec.Struct] | None:
    kind, _ = _unwrap(field.type)
    return kind.cls if isinstance(kind, StructType) else None


def _unwrap(kind: Type) -> tuple[Type, str]:
    """Return the type without its annotation, and its description."""
    if isinstance(kind, Metadata):
        return kind.type, str((kind.extra_json_schema or {}).get("description", ""))
    return kind, ""


def _add_flag(group: "argparse._ArgumentGroup", name: str, field: msgspec.inspect.Field) -> None:
    kind, text = _unwrap(field.type)
    default = "" if field.default is msgspec.NODEFAULT else shown_default(name, field.default)
    shown = f" (default {default})" if default else ""
    options: dict[str, Any] = {
        "dest": name,
        "default": None,
        "help": f"{text}{shown} [{env_name(name)}]".replace("%", "%%"),
    }
    flag = "--" + name.replace("_", "-").removesuffix("-bytes").removesuffix("-s")
    if (bare := _bare(field.type)) is not None:
        group.add_argument(flag, metavar=_metavar(name, kind), nargs="?", const=bare, **options)
    elif isinstance(kind, BoolType):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    else:
        is_list = isinstance(kind, VarTupleType)
        group.add_argument(flag, metavar=_metavar(name, kind), action="append" if is_list else "store", **options)


def _bare(kind: Type) -> str | None:
    """Return the value of a flag that is given without one; None if it needs one."""
    return (kind.extra or {}).get(BARE_FLAG) if isinstance(kind, Metadata) else None


def shown_default(name: str, default: object) -> str:
    """Return a default as help texts and the documentation show it. Empty, zero and false defaults are left out."""
    if default in (None, "", 0, False, ()):
        return ""
    if name.endswith("_bytes") and isinstance(default, int):
        return format_size(default)
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _metavar(name: str, kind: Type) -> str:
    if name.endswith("_bytes"):
        return "SIZE"
    if name.endswith("_s"):
        return "SECONDS"
    if isinstance(kind, IntType):
        return "N"
    if isinstance(kind, VarTupleType):
        return "A,B,…"
    return "X" if isinstance(kind, msgspec.inspect.FloatType) else "TEXT"
