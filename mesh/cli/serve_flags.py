"""Defines the flags of `repertory serve` and their environment variables, and checks each value."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.addresses import parse_address
from common.config import env_name, is_true
from common.errors import ConfigError
from common.units import parse_size
from mesh.envoy.binary import INSTALLED

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags. A flag's environment variable is REPERTORY_<NAME>; help texts never show its value, which may be a key."""
    home = str(Path(os.environ.get("XDG_DATA_HOME", str(Path.home() / ".local/share"))) / "repertory")

    dests: dict[str, str] = {env_name("log_json"): "log_json"}

    def flag(
        name: str,
        default: str,
        parse: Callable[[str], object],
        text: str,
        *,
        alias: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        env = env_name(name.replace("-", "_"))
        shown = f" (default {default})" if default else ""
        help_text = f"{text} [{env}]{shown}".replace("%", "%%")
        default = os.environ.get(env, default)
        parser.add_argument(f"--{name}", *alias, action=_Store, default=default, type=parse, help=help_text, **options)
        dests[env] = name.replace("-", "_")

    flag(
        "http-listen",
        "127.0.0.1:8080",
        _address,
        "address of HTTP: OpenAI API, admin, health and metrics",
        metavar="HOST:PORT",
    )
    flag(
        "grpc-listen",
        "127.0.0.1:8033",
        _address,
        "address of gRPC: management, and inference by model name",
        metavar="HOST:PORT",
    )
    flag("home", home, str, "directory of registrations, sockets and, by default, the model cache", metavar="DIR")
    flag(
        "store",
        "",
        str,
        "etcd://HOST:PORT[,…] to share the registry with other pods; empty = files in the home directory",
        metavar="URL",
    )
    flag(
        "models",
        "",
        _file,
        "YAML file of models and aliases to register at the start; it is read again after SIGHUP",
        metavar="FILE",
    )
    flag(
        "memory",
        "",
        _size,
        "device memory for the weights and KV cache of all models, such as 16GiB; empty = chosen from the machine",
        metavar="SIZE",
    )
    flag(
        "host-memory",
        "",
        _size,
        "pinned host memory for evicted models (GPU only); empty = chosen from the machine",
        metavar="SIZE",
    )
    flag("device", "auto", _device, "device: auto, cpu, cuda or cuda:N", metavar="DEVICE")
    flag(
        "tensor-parallel",
        "1",
        _positive,
        "number of devices that share every model, from the device on",
        alias=("--num-shard", "--tensor-parallel-size"),
        metavar="N",
    )
    flag(
        "oversubscribe",
        "auto",
        _one_of("auto", "none", "host", "disk"),
        "where loaded models without device memory are kept: none, host or disk; auto = host on a GPU, none on a CPU",
        metavar="WHERE",
    )
    flag("cache-dir", "", str, "directory of pulled and packed files; empty = in the home directory", metavar="DIR")
    flag(
        "cache-size",
        "",
        _size,
        "disk budget of the cache, such as 200GiB; empty = 80 % of the free disk space",
        metavar="SIZE",
    )
    flag(
        "model-roots",
        "",
        str,
        "directories that models may be registered from by path, comma separated; empty = the directory models in the home directory",
        metavar="A,B,…",
    )
    flag(
        "source-hosts",
        "",
        str,
        "hosts outside the public internet that models may be fetched from: names, addresses, networks or *; comma separated",
        metavar="A,B,…",
    )
    flag(
        "api-keys",
        "",
        str,
        "accepted bearer keys, comma separated; empty = requests need no authentication",
        metavar="A,B,…",
    )
    flag(
        "api-keys-file",
        "",
        str,
        "YAML file of hashed keys with their names, scopes, models and limits; `repertory new-key` makes entries",
        metavar="FILE",
    )
    flag(
        "envoy",
        "",
        str,
        "let Envoy carry the calls of loaded models; without BINARY, the installed program; empty = the mesh carries all calls",
        nargs="?",
        const=INSTALLED,
        metavar="BINARY",
    )
    flag("tls-cert", "", str, "file of the certificate chain of both ports; empty = plain text", metavar="FILE")
    flag("tls-key", "", str, "file of the key of --tls-cert", metavar="FILE")
    flag(
        "allowed-hosts",
        "",
        str,
        "further host names of this server in requests of browsers and, on loopback, of any program; comma separated, * = any",
        metavar="A,B,…",
    )
    flag(
        "cors-origins",
        "",
        str,
        "origins such as https://chat.example whose web pages may call this server; comma separated, * = any",
        metavar="A,B,…",
    )
    flag(
        "wait-budget",
        "120",
        _seconds,
        "longest time in seconds that a request waits for its model to be loaded, or for memory that other models use",
        metavar="SECONDS",
    )
    flag(
        "grace",
        "30",
        _seconds,
        "time in seconds that running requests have to finish after SIGTERM, or before their model is unloaded",
        metavar="SECONDS",
    )
    flag(
        "log-level",
        "info",
        _one_of("debug", "info", "warning", "error"),
        "lowest level that is logged: debug, info, warning or error",
        metavar="LEVEL",
    )
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


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


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
