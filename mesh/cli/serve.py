"""Implements `repertory serve`: supervises a mesh and a runtime on one machine, and Envoy if asked to. The runtime supervises its engine.

A process that exits or hangs is restarted. On SIGTERM the mesh drains first, then the others end.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import logs
from common.addresses import check_free, parse_address
from common.exit_status import CANNOT_START
from mesh.cli import leftovers
from mesh.cli.banner import ServerFacts
from mesh.cli.serve_envoy import envoy_process, mesh_address, starts_envoy
from mesh.cli.serve_settings import Settings, mesh_config, settings_of
from mesh.cli.supervised_process import SupervisedProcess, status_of
from mesh.cli.supervisor import Supervisor
from mesh.envoy.binary import ELSEWHERE
from mesh.errors import Unavailable
from mesh.types import RuntimeSnapshot

logger = logging.getLogger(__name__)

_READY = 200
_RECORDS = {
    "runtime": "runtime.pid",
    "mesh": "mesh.pid",
    "envoy": "envoy.pid",
}  # files of leftovers, in the run directory


def serve(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    try:
        settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(settings.run_dir):
            ended = [name for name, file in _RECORDS.items() if leftovers.end_recorded(settings.run_dir / file)]
            is_ours = settings.mesh["envoy"] != ELSEWHERE  # else an Envoy may listen there already
            for kind, field in (("gRPC", "grpc_listen"), ("HTTP", "http_listen")) if is_ours else ():
                check_free(parse_address(str(settings.mesh[field]), field), kind)
            logs.set_up(as_json=bool(settings.mesh["log_json"]), level=str(settings.mesh["log_level"]))
            for name in ended:
                logger.warning("ended the %s process that a killed `repertory serve` had left running", name)
            status = asyncio.run(_supervisor(settings).run())
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


def _supervisor(settings: Settings) -> Supervisor:
    run_dir, config = settings.run_dir, mesh_config(settings)
    python = [sys.executable, "-m"]
    runtime = SupervisedProcess(
        "runtime",
        [*python, "runtime", "--config", str(_write(run_dir / "runtime.json", settings.runtime))],
        str(settings.runtime["http_listen"]),
        run_dir / _RECORDS["runtime"],
        environment=settings.runtime_environment,
    )
    envoy = envoy_process(config, run_dir / _RECORDS["envoy"]) if starts_envoy(config) else None
    content = {**settings.mesh, "envoy": ELSEWHERE} if envoy else settings.mesh
    mesh = SupervisedProcess(
        "mesh",
        [*python, "mesh", "serve-mesh", "--config", str(_write(run_dir / "mesh.json", content))],
        mesh_address(config),
        run_dir / _RECORDS["mesh"],
        tls=bool(config.tls_cert) and not config.envoy,
    )
    # The mesh drains first, because its streams need the runtime until they end.
    return Supervisor(
        *(mesh, runtime) if envoy is None else (mesh, envoy, runtime),
        grace_s=config.grace_s,
        announce=lambda: _announce(settings),
        gets_sighup=mesh if config.models_file else None,
    )


async def _announce(settings: Settings) -> None:
    """Wait until the mesh is ready, then report what was started."""
    from mesh.client.runtime import look  # the client verbs start faster without gRPC

    address = str(settings.mesh["http_listen"])
    started_s = time.monotonic()
    tls = bool(settings.mesh["tls_cert"])
    while await status_of(address, "/readyz", 2.0, tls=tls) != _READY:  # noqa: ASYNC110 - another process sets no event
        await asyncio.sleep(0.2)
    seconds = time.monotonic() - started_s
    snapshot = await look(str(settings.mesh["runtime_grpc"]))
    facts = ServerFacts(
        seconds,
        http=address,
        grpc=str(settings.mesh["grpc_listen"]),
        num_keys=len(settings.mesh["api_keys"]),
        keys_file=str(settings.mesh["api_keys_file"]),
        tls=tls,
        envoy=str(settings.mesh["envoy"]),
        snapshot=snapshot or RuntimeSnapshot(0),
    )
    if settings.mesh["log_json"]:
        logger.info("ready", extra=facts.fields())
    else:
        print(facts.banner(), flush=True)
    if warning := facts.warning():
        logger.warning("%s", warning)


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration that only this user can read, because it may contain keys."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=1)
    return path
