"""Starts Envoy beside a mesh, for `repertory serve` and `serve-mesh`, and runs `serve-mesh --envoy` as two supervised processes."""

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from common import logs
from common.addresses import check_free, parse_address
from common.exit_status import CANNOT_START
from mesh.cli import leftovers
from mesh.cli.supervised_process import SupervisedProcess
from mesh.cli.supervisor import Supervisor
from mesh.config.schema import MeshConfig
from mesh.envoy.binary import ELSEWHERE, find_envoy
from mesh.envoy.bootstrap import envoy_files, write_bootstrap
from mesh.envoy.files import write_whole
from mesh.envoy.plan import Carrier

logger = logging.getLogger(__name__)

_MOST_THREADS = 16
_JSON_LINES = '{"time":"%Y-%m-%dT%T.%e","level":"%l","logger":"envoy.%n","message":"%j"}'


def starts_envoy(config: MeshConfig) -> bool:
    """Return whether this program runs Envoy, and not only a mesh that expects one."""
    return config.envoy not in ("", ELSEWHERE)


def mesh_address(config: MeshConfig) -> str:
    """Return where the mesh itself serves HTTP: behind Envoy, on a socket."""
    return envoy_files(config).mesh(Carrier.HTTP) if config.envoy else config.http_listen


def num_threads(config: MeshConfig, num_cores: int) -> int:
    """Return the number of Envoy's threads that carry calls. Each has connections of its own to every copy."""
    return config.envoy_threads or min(num_cores, _MOST_THREADS)


def envoy_process(config: MeshConfig, record: Path) -> SupervisedProcess:
    """Write Envoy's configuration and return its process, not started. Raises InvalidRequest, ConfigError, OSError."""
    binary = find_envoy(config.envoy)
    files = envoy_files(config)
    for carrier in Carrier:
        files.routes(carrier).unlink(missing_ok=True)  # of an earlier run, whose keys may have been removed since
    write_bootstrap(config)
    level = "warning" if config.log_level.lower() == "info" else config.log_level.lower()
    command = [str(binary.path), "-c", str(files.bootstrap), "--disable-hot-restart", "-l", level]
    command += ["--concurrency", str(num_threads(config, len(os.sched_getaffinity(0))))]
    if config.log_json:
        command += ["--log-format", _JSON_LINES]
    return SupervisedProcess("envoy", command, files.admin, record)


def serve_mesh_with_envoy(config: MeshConfig, *, warnings: Sequence[str] = ()) -> int:
    """Run a mesh and its Envoy until a signal, and return the exit status.

    They are two processes, so that Envoy keeps its configuration while a crashed mesh is restarted.
    """
    logs.set_up(as_json=config.log_json, level=config.log_level)
    files = envoy_files(config)
    files.make_directory()
    records = {name: files.directory / f"{name}.pid" for name in ("mesh", "envoy")}
    for record in records.values():
        leftovers.end_recorded(record)
    for kind, address in (("gRPC", config.grpc_listen), ("HTTP", config.http_listen)):
        check_free(parse_address(address), kind)
    for warning in warnings:
        logger.warning("%s", warning)
    envoy = envoy_process(config, records["envoy"])
    write_whole(files.mesh_settings, msgspec.json.encode(msgspec.structs.replace(config, envoy=ELSEWHERE)).decode())
    mesh = SupervisedProcess(
        "mesh", [sys.executable, "-m", "mesh.pod", str(files.mesh_settings)], mesh_address(config), records["mesh"]
    )
    supervisor = Supervisor(
        mesh,
        envoy,
        grace_s=config.grace_s,
        announce=asyncio.Event().wait,
        gets_sighup=mesh if config.models_file else None,
    )
    status = asyncio.run(supervisor.run())
    return 1 if status == CANNOT_START else status
