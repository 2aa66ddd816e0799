"""Implements `repertory serve`: supervises a mesh and a runtime on one machine. The runtime supervises its engine.

A process that exits or hangs is restarted. On SIGTERM the mesh drains first, then the runtime.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from common import logs
from common.addresses import check_free, parse_address
from common.config import load, read_mapping
from common.errors import ConfigError
from common.exit_status import CANNOT_START
from mesh.cli import leftovers
from mesh.cli.render import size
from mesh.cli.supervisor import SupervisedProcess, reachable, status_of
from mesh.client.admin import DEFAULT_SERVER
from mesh.config import MeshConfig
from mesh.errors import Unavailable

logger = logging.getLogger(__name__)

_READY = 200
_RECORDS = {"runtime": "runtime.pid", "mesh": "mesh.pid"}  # files of leftovers, in the run directory


@dataclass(frozen=True, slots=True)
class Settings:
    """The configurations of the two processes, as JSON objects of MeshConfig's and RuntimeConfig's fields."""

    run_dir: Path
    mesh: Mapping[str, Any]
    runtime: Mapping[str, Any]


# The configuration fields that each flag of `serve` sets, as paths below `mesh` and `runtime`.
_FIELDS_OF_FLAG: dict[str, tuple[tuple[str, ...], ...]] = {
    "http_listen": (("mesh", "http_listen"),),
    "grpc_listen": (("mesh", "grpc_listen"),),
    "store": (("mesh", "store"),),
    "wait_budget": (("mesh", "wait_budget_s"),),
    "api_keys": (("mesh", "api_keys"),),
    "allowed_hosts": (("mesh", "allowed_hosts"),),
    "cors_origins": (("mesh", "cors_origins"),),
    "memory": (("runtime", "engine", "device_budget_bytes"),),
    "host_memory": (("runtime", "engine", "host_budget_bytes"),),
    "device": (("runtime", "engine", "device"),),
    "oversubscribe": (("runtime", "engine", "oversubscribe"),),
    "cache_dir": (("runtime", "cache_dir"),),
    "model_roots": (("runtime", "model_roots"),),
    "source_hosts": (("runtime", "source_hosts"),),
    "cache_size": (("runtime", "cache_budget_bytes"),),
    "grace": (("mesh", "grace_s"), ("runtime", "grace_s")),
    "log_level": (("mesh", "log_level"), ("runtime", "log_level")),
    "log_json": (("mesh", "log_json"), ("runtime", "log_json")),
}


def settings_of(args: argparse.Namespace) -> Settings:
    """Merge flags and environment (`args.given` names those that were set), the file, and the defaults, in this order.

    Raises ConfigError for a bad file.
    """
    run_dir = Path(args.home).expanduser() / "run"
    tree = _from_flags(args, run_dir)
    if args.config is not None:
        given = {path: _at(tree, path) for flag in args.given for path in _FIELDS_OF_FLAG.get(flag, ())}
        _overlay(args.config, tree)
        for path, value in given.items():
            _at(tree, path[:-1])[path[-1]] = value
    mesh = tree["mesh"]
    if empty := next((name for name, value in mesh.items() if value is None), None):
        raise ConfigError(f"configuration file {args.config}: {empty} of `mesh:` has no value")
    # Check and normalise the mesh's settings. The runtime checks its own when it starts.
    known = msgspec.to_builtins(load(MeshConfig, flags=mesh, env={}))
    mesh |= {name: value for name, value in known.items() if name in mesh}
    for field in ("grpc_listen", "http_listen"):
        parse_address(str(mesh[field]), field)
    return Settings(run_dir, mesh, tree["runtime"])


def _from_flags(args: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    home = run_dir.parent
    both = {"log_json": args.log_json, "log_level": args.log_level, "grace_s": args.grace}
    runtime = {
        "listen": [f"unix:{run_dir}/runtime.sock"],
        "http_listen": f"unix:{run_dir}/runtime-http.sock",
        "cache_dir": str(Path(args.cache_dir).expanduser() if args.cache_dir else home / "cache"),
        "cache_budget_bytes": args.cache_size,
        "model_roots": _listed(args.model_roots) or [str(home / "models")],
        "source_hosts": _listed(args.source_hosts),
        "engine": {
            "device": args.device,
            "oversubscribe": args.oversubscribe,
            "device_budget_bytes": args.memory,
            "host_budget_bytes": args.host_memory,
        },
        **both,
    }
    mesh = {
        "grpc_listen": args.grpc_listen,
        "http_listen": args.http_listen,
        "store": args.store or f"embedded:{home / 'registry'}",
        "runtime_grpc": runtime["listen"][0],
        "runtime_http": runtime["http_listen"],
        "wait_budget_s": args.wait_budget,
        "api_keys": tuple(_listed(args.api_keys)),
        "allowed_hosts": tuple(_listed(args.allowed_hosts)),
        "cors_origins": tuple(_listed(args.cors_origins)),
        **both,
    }
    return {"mesh": mesh, "runtime": runtime}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _overlay(file: Path, tree: dict[str, Any]) -> None:
    content = read_mapping(file)
    if set(content) - {"mesh", "runtime"}:
        raise ConfigError(f"configuration file {file}: expected the sections `mesh:` and `runtime:`")
    mesh, runtime = tree["mesh"], tree["runtime"]
    mesh.update(_section(file, "mesh", content.get("mesh")))
    section = dict(_section(file, "runtime", content.get("runtime")))
    runtime["engine"] = {**runtime["engine"], **_section(file, "engine", section.pop("engine", None))}
    runtime.update(section)


def _section(file: Path, name: str, content: object) -> Mapping[str, Any]:
    if not isinstance(content, dict | None):
        raise ConfigError(f"configuration file {file}: `{name}:` must hold `field: value` lines")
    return content or {}


def serve(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(settings.run_dir):
            ended = [name for name, file in _RECORDS.items() if leftovers.end_recorded(settings.run_dir / file)]
            for kind, field in (("gRPC", "grpc_listen"), ("HTTP", "http_listen")):
                check_free(parse_address(str(settings.mesh[field]), field), kind)
            logs.set_up(as_json=bool(settings.mesh["log_json"]), level=str(settings.mesh["log_level"]))
            for name in ended:
                logger.warning("ended the %s process that a killed `repertory serve` had left running", name)
            status = asyncio.run(_Supervisor(settings).run())
            return 1 if status == CANNOT_START else status
    except OSError as error:
        raise Unavailable(str(error)) from None


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Lock the directory against a second `repertory serve`. Raises Unavailable if another process holds the lock."""
    with (run_dir / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                f"another `repertory serve` uses {run_dir.parent}; stop it, or pass another directory with --home"
            ) from None
        yield


class _Supervisor:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = asyncio.Event()
        run_dir = settings.run_dir
        self._grace_s = float(settings.mesh["grace_s"])
        self._runtime = SupervisedProcess(
            "runtime",
            [sys.executable, "-m", "runtime", "--config", str(_write(run_dir / "runtime.json", settings.runtime))],
            str(settings.runtime["http_listen"]),
            run_dir / _RECORDS["runtime"],
        )
        self._mesh = SupervisedProcess(
            "mesh",
            [sys.executable, "-m", "mesh", "serve-mesh", "--config", str(_write(run_dir / "mesh.json", settings.mesh))],
            str(settings.mesh["http_listen"]),
            run_dir / _RECORDS["mesh"],
        )

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_signal)
        processes = [asyncio.create_task(process.run(self._stopping)) for process in (self._runtime, self._mesh)]
        announce = asyncio.create_task(self._announce())
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([*processes, stop], return_when=asyncio.FIRST_COMPLETED)
        failed = next((task.result() for task in processes if task.done()), 0)
        self._stopping.set()
        announce.cancel()
        # The mesh drains first, because its streams need the runtime until they end.
        await self._mesh.stop(self._grace_s + 5)
        await self._runtime.stop(self._grace_s + 5)
        await asyncio.gather(*processes, stop, announce, return_exceptions=True)
        return failed

    def _handle_signal(self) -> None:
        if self._stopping.is_set():
            for process in (self._mesh, self._runtime):
                process.kill()
            return
        self._stopping.set()
        logger.info(
            "stopping: running requests have %g s to finish; send the signal again to stop at once", self._grace_s
        )

    async def _announce(self) -> None:
        """Wait until the mesh is ready, then print how to use it."""
        address = str(self._settings.mesh["http_listen"])
        started_s = time.monotonic()
        while await status_of(address, "/readyz", 2.0) != _READY:  # noqa: ASYNC110 - another process sets no event
            await asyncio.sleep(0.2)
        budget = self._settings.runtime["engine"].get("device_budget_bytes", 0)
        note = f", {size(budget) if isinstance(budget, int) else budget} for models" if budget else ""
        url = address if address.startswith("unix:") else f"http://{reachable(address)}"
        server = "" if url == DEFAULT_SERVER else f" --server {url}"
        seconds = round(time.monotonic() - started_s, 1)
        if self._settings.mesh["log_json"]:
            logger.info("ready", extra={"seconds": seconds, "http": url, "grpc": self._settings.mesh["grpc_listen"]})
            return
        print(
            f"Repertory is ready after {seconds} s{note}\n"
            f"  OpenAI API  {url}/v1\n  gRPC        {self._settings.mesh['grpc_listen']}\n"
            f"  next        repertory register NAME URI --load{server}   (then: repertory run NAME{server})",
            flush=True,
        )


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration that only this user can read, because it may contain keys."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=1)
    return path
