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
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import logs
from common.addresses import check_free, parse_address
from common.exit_status import CANNOT_START
from mesh.cli import leftovers
from mesh.cli.banner import ServerFacts
from mesh.cli.serve_settings import Settings, settings_of
from mesh.cli.supervisor import SupervisedProcess, status_of
from mesh.errors import Unavailable
from mesh.types import RuntimeSnapshot

logger = logging.getLogger(__name__)

_READY = 200
_RECORDS = {"runtime": "runtime.pid", "mesh": "mesh.pid"}  # files of leftovers, in the run directory


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


class Supervisor:
    """Runs the two processes until a signal, and ends them: at most `grace_s` after the first signal, at once after a second one.

    `announce` runs beside them and reports when they are ready. With `forwards_sighup`, the mesh gets SIGHUP, after which it reads its models file again.
    """

    def __init__(
        self,
        runtime: SupervisedProcess,
        mesh: SupervisedProcess,
        *,
        grace_s: float,
        announce: Callable[[], Coroutine[Any, Any, object]],
        forwards_sighup: bool = False,
    ) -> None:
        self._runtime = runtime
        self._mesh = mesh
        self._grace_s = grace_s
        self._announce = announce
        self._forwards_sighup = forwards_sighup
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Return 0, or the exit status of a process that can never start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_signal)
        if self._forwards_sighup:
            loop.add_signal_handler(signal.SIGHUP, self._mesh.send_signal, signal.SIGHUP)
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


def _supervisor(settings: Settings) -> Supervisor:
    run_dir = settings.run_dir
    python = [sys.executable, "-m"]
    runtime = SupervisedProcess(
        "runtime",
        [*python, "runtime", "--config", str(_write(run_dir / "runtime.json", settings.runtime))],
        str(settings.runtime["http_listen"]),
        run_dir / _RECORDS["runtime"],
        environment=settings.runtime_environment,
    )
    mesh = SupervisedProcess(
        "mesh",
        [*python, "mesh", "serve-mesh", "--config", str(_write(run_dir / "mesh.json", settings.mesh))],
        str(settings.mesh["http_listen"]),
        run_dir / _RECORDS["mesh"],
        tls=bool(settings.mesh["tls_cert"]),
    )
    grace_s = float(settings.mesh["grace_s"])
    return Supervisor(
        runtime,
        mesh,
        grace_s=grace_s,
        announce=lambda: _announce(settings),
        forwards_sighup=bool(settings.mesh["models_file"]),
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
