"""Defines the flags of `repertory serve` and their environment variables, and checks each value."""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.addresses import parse_address
from common.config import env_name, is_true
from common.errors import ConfigError
from common.units import parse_size
from mesh.envoy.binary import INSTALLED

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class _Flag:
    """One flag. `const`: its value where it is given without one; None = it needs a value."""

    name: str
    default: str
    parse: Callable[[str], object]
    metavar: str
    text: str
    alias: tuple[str, ...] = ()
    const: str | None = None


class _Store(argparse.Action):
    """Stores a value and adds the flag to `given`, so that a default can be distinguished from a value that the user chose."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = namespace.given | {self.dest}


class _StoreBoolean(argparse.BooleanOptionalAction):
    """Like `_Store`, for `--flag` and `--no-flag`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        super().__call__(parser, namespace, values, option_string)
        namespace.given = namespace.given | {self.dest}


def _address(text: str) -> str:
    try:
        parse_address(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _file(text: str) -> str:
    """Return an absolute path, because the processes may run elsewhere."""
    return str(Path(text).expanduser().absolute()) if text else ""


def _size(text: str) -> int:
    """Return the size in bytes, 0 for an empty text."""
    try:
        return parse_size(text) if text else 0
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size_or_none(text: str) -> int | None:
    """Return the size in bytes, None for an empty text."""
    return _size(text) if text else None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _groups(text: str) -> str:
    layers = [[part.strip() for part in layer.split(",")] for layer in text.split("+")] if text.strip() else []
    if not all(part.isdigit() and int(part) for layer in layers for part in layer):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers of at least 1, such as 2,1,1 or 1,1+2")
    return "+".join(",".join(layer) for layer in layers)


def _one_of(*words: str) -> Callable[[str], str]:
    """Return a parser of one of `words`. argparse's `choices` do not check defaults, which come from the environment."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(words)}")
        return text.lower()

    return parse


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected auto, cpu, cuda or cuda:N")
    return text


def _default_home() -> str:
    return str(Path(os.environ.get("XDG_DATA_HOME", str(Path.home() / ".local/share"))) / "repertory")


_FLAGS = (
    _Flag(
        "http-listen", "127.0.0.1:8080", _address, "HOST:PORT", "address of HTTP: OpenAI API, admin, health and metrics"
    ),
    _Flag(
        "grpc-listen",
        "127.0.0.1:8033",
        _address,
        "HOST:PORT",
        "address of gRPC: management, and inference by model name",
    ),
    _Flag("home", "", str, "DIR", "directory of registrations, sockets and, by default, the model cache"),
    _Flag(
        "store",
        "",
        str,
        "URL",
        "etcd://HOST:PORT[,…] to share the registry with other pods; empty = files in the home directory",
    ),
    _Flag(
        "models",
        "",
        _file,
        "FILE",
        "YAML file of models and aliases to register at the start; it is read again after SIGHUP",
    ),
    _Flag(
        "memory",
        "",
        _size,
        "SIZE",
        "device memory for the weights and KV cache of all models, such as 16GiB; empty = chosen from the machine",
    ),
    _Flag(
        "host-memory",
        "",
        _size,
        "SIZE",
        "pinned host memory for evicted models (GPU only); empty = chosen from the machine",
    ),
    _Flag(
        "host-kv",
        "",
        _size_or_none,
        "SIZE",
        "the most host memory for KV cache whose device memory was reclaimed; empty = a quarter of the host memory (CPU: 0), 0 = it is dropped",
    ),
    _Flag("device", "auto", _device, "DEVICE", "device: auto, cpu, cuda or cuda:N"),
    _Flag(
        "tensor-parallel",
        "1",
        _positive,
        "N",
        "number of GPUs in each group, which share a model; all visible GPUs are used",
        alias=("--num-shard", "--tensor-parallel-size"),
    ),
    _Flag(
        "gpu-groups",
        "",
        _groups,
        "N,N,…",
        "sizes of the groups of GPUs, such as 2,1,1; after a +, further groups of the same GPUs, as in 1,1+2",
    ),
    _Flag(
        "oversubscribe",
        "auto",
        _one_of("auto", "none", "host", "disk"),
        "WHERE",
        "where loaded models without device memory are kept: none, host or disk; auto = host on a GPU, none on a CPU",
    ),
    _Flag("cache-dir", "", str, "DIR", "directory of pulled and packed files; empty = in the home directory"),
    _Flag(
        "cache-size", "", _size, "SIZE", "disk budget of the cache, such as 200GiB; empty = 80 % of the free disk space"
    ),
    _Flag(
        "model-roots",
        "",
        str,
        "A,B,…",
        "directories that models may be registered from by path, comma separated; empty = the directory models in the home directory",
    ),
    _Flag(
        "source-hosts",
        "",
        str,
        "A,B,…",
        "hosts outside the public internet that models may be fetched from: names, addresses, networks or *; comma separated",
    ),
    _Flag(
        "api-keys", "", str, "A,B,…", "accepted bearer keys, comma separated; empty = requests need no authentication"
    ),
    _Flag(
        "api-keys-file",
        "",
        str,
        "FILE",
        "YAML file of hashed keys with their names, scopes, models and limits; `repertory new-key` makes entries",
    ),
    _Flag(
        "envoy",
        "",
        str,
        "BINARY",
        "let Envoy carry the calls of loaded models; without BINARY, the installed program; empty = the mesh carries all calls",
        const=INSTALLED,
    ),
    _Flag(
        "workers",
        "0",
        _count,
        "N",
        "processes on both ports for the calls of loaded models; 0 = the mesh carries all calls",
    ),
    _Flag("tls-cert", "", str, "FILE", "file of the certificate chain of both ports; empty = plain text"),
    _Flag("tls-key", "", str, "FILE", "file of the key of --tls-cert"),
    _Flag(
        "allowed-hosts",
        "",
        str,
        "A,B,…",
        "further host names of this server in requests of browsers and, on loopback, of any program; comma separated, * = any",
    ),
    _Flag(
        "cors-origins",
        "",
        str,
        "A,B,…",
        "origins such as https://chat.example whose web pages may call this server; comma separated, * = any",
    ),
    _Flag(
        "wait-budget",
        "120",
        _seconds,
        "SECONDS",
        "longest time in seconds that a request waits for its model to be loaded, or for memory that other models use",
    ),
    _Flag(
        "grace",
        "30",
        _seconds,
        "SECONDS",
        "time in seconds that running requests have to finish after SIGTERM, or before their model is unloaded",
    ),
    _Flag(
        "log-level",
        "info",
        _one_of("debug", "info", "warning", "error"),
        "LEVEL",
        "lowest level that is logged: debug, info, warning or error",
    ),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags. A flag's environment variable is REPERTORY_<NAME>; help texts never show its value, which may be a key."""
    defaults = {"home": _default_home()}
    dests: dict[str, str] = {env_name("log_json"): "log_json"}
    for flag in _FLAGS:
        dest = flag.name.replace("-", "_")
        default = defaults.get(flag.name, flag.default)
        shown = f" (default {default})" if default else ""
        without_value: dict[str, Any] = {} if flag.const is None else {"nargs": "?", "const": flag.const}
        parser.add_argument(
            f"--{flag.name}",
            *flag.alias,
            action=_Store,
            default=os.environ.get(env_name(dest), default),
            type=flag.parse,
            help=f"{flag.text} [{env_name(dest)}]{shown}".replace("%", "%%"),
            metavar=flag.metavar,
            **without_value,
        )
        dests[env_name(dest)] = dest
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file with any fields of the mesh under `mesh:` and of the runtime under `runtime:`; flags and environment variables override it",
    )
    parser.add_argument(
        "--log-json",
        action=_StoreBoolean,
        default=is_true(os.environ.get("REPERTORY_LOG_JSON", "")),
        help="write logs as JSON lines [REPERTORY_LOG_JSON]",
    )
    parser.set_defaults(given=frozenset(dest for env, dest in dests.items() if env in os.environ))
