"""The runtime's configuration out of flags, environment and a file: flag beats environment beats file beats default.

Every field of RuntimeConfig and of its engine part has a flag and a variable of its name. Knows the tree's shape, not what the fields mean,
but for sizes (`512MiB`) where a name ends in `_bytes`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from runtime.config.schema import GIB, MIB, EngineConfig, RuntimeConfig
from runtime.errors import InvalidRequest

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_Fields = dict[str, msgspec.inspect.Field]


def configure(arguments: Sequence[str], env: Mapping[str, str]) -> RuntimeConfig:
    """Raises InvalidRequest naming the flag, variable or file and the field; SystemExit for --help and unknown flags."""
    runtime, engine = _fields(RuntimeConfig), _fields(EngineConfig)
    del runtime["engine"]
    parser = argparse.ArgumentParser(
        prog="repertory serve-runtime",
        description="One runtime: holds models, answers gRPC (TGIS, Open Inference Protocol, mmesh.ModelRuntime) and OpenAI HTTP.",
        epilog="A flag beats its environment variable (in brackets), which beats the file. Sizes: 512MiB, 40GiB.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON with any of the fields below, the engine's under `engine:`; or JSON text",
    )
    _add_flags(parser.add_argument_group("runtime"), runtime)
    _add_flags(parser.add_argument_group("engine"), engine)
    given = vars(parser.parse_args(arguments))
    content = _read_file(given["config"]) if given["config"] else {}
    inner = content.pop("engine", None) or {}
    if not isinstance(inner, dict):
        raise InvalidRequest("configuration file: `engine:` must hold fields")
    tree = {**_merge(content, runtime, env, given), "engine": _merge(inner, engine, env, given)}
    try:
        return msgspec.convert(tree, RuntimeConfig, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"configuration: {error}") from None


def parse_size(text: str) -> int:
    """Bytes of `123`, `4GiB`, `4G` (both binary) or `4GB` (decimal). Raises ValueError."""
    match = _SIZE.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with KiB, MiB, GiB or TiB")
    number, unit, binary = match.groups()
    decimal = not binary and text.strip().lower().endswith("b") and unit != ""
    return int(float(number) * (1000 if decimal else 1024) ** _POWER[unit.lower()])


def _fields(kind: type[msgspec.Struct]) -> _Fields:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return {field.name: field for field in info.fields}


def _add_flags(group: "argparse._ArgumentGroup", fields: _Fields) -> None:
    for name, field in fields.items():
        kind, text = _plain(field.type)
        shown = "" if field.default in ("", 0, False, ()) else f" (default {_shown(name, field.default)})"
        flag = "--" + name.replace("_", "-").removesuffix("-bytes").removesuffix("-s")
        options: dict[str, Any] = {
            "dest": name,
            "default": None,
            "help": f"{text}{shown} [{_variable(name)}]".replace("%", "%%"),
        }
        if isinstance(kind, msgspec.inspect.BoolType):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            group.add_argument(
                flag, metavar=_metavar(name, kind), action="append" if _is_list(kind) else "store", **options
            )


def _shown(name: str, default: object) -> object:
    if name.endswith("_bytes") and isinstance(default, int) and default % MIB == 0:
        return f"{default // GIB}GiB" if default % GIB == 0 else f"{default // MIB}MiB"
    return ",".join(map(str, default)) if isinstance(default, tuple) else default


def _metavar(name: str, kind: msgspec.inspect.Type) -> str:
    if name.endswith("_bytes"):
        return "SIZE"
    if name.endswith("_s"):
        return "SECONDS"
    if isinstance(kind, msgspec.inspect.IntType):
        return "N"
    return "A,B,…" if _is_list(kind) else "TEXT"


def _variable(name: str) -> str:
    return f"REPERTORY_{name.upper()}"


def _merge(
    content: Mapping[str, object], fields: _Fields, env: Mapping[str, str], given: Mapping[str, object]
) -> dict[str, object]:
    if unknown := sorted(set(content) - set(fields)):
        raise InvalidRequest(f"configuration file: unknown field {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    merged = {name: _value("configuration file", name, fields[name], value) for name, value in content.items()}
    for name, field in fields.items():
        variable = _variable(name)
        if variable in env:
            merged[name] = _value(f"environment variable {variable}", name, field, env[variable])
        flag = given.get(name)
        if flag is not None:
            merged[name] = _value("flag", name, field, ",".join(flag) if isinstance(flag, list) else flag)
    return merged


def _value(where: str, name: str, field: msgspec.inspect.Field, value: object) -> object:
    if not isinstance(value, str):
        return value
    kind, _ = _plain(field.type)
    if name.endswith("_bytes"):
        try:
            return parse_size(value)
        except ValueError as error:
            raise InvalidRequest(f"{where}, {name}: {error}") from None
    if _is_list(kind):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(kind, msgspec.inspect.BoolType):
        return value.strip().lower() in ("1", "true", "yes", "on")
    return value


def _plain(kind: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, str]:
    if isinstance(kind, msgspec.inspect.Metadata):
        return kind.type, str((kind.extra_json_schema or {}).get("description", ""))
    return kind, ""


def _is_list(kind: msgspec.inspect.Type) -> bool:
    return isinstance(kind, msgspec.inspect.VarTupleType)


def _read_file(given: str) -> dict[str, Any]:
    try:
        text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
    except OSError as error:
        raise InvalidRequest(f"configuration file {given}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InvalidRequest(f"configuration file {given}: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequest(f"configuration file {given}: expected `name: value` lines")
    return content
