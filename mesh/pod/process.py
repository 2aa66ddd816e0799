"""Runs one pod as a process: configures logging, serves until SIGTERM, then lets running requests end."""

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence

import uvloop

from common import logs
from common.background_tasks import wait_for_any
from common.config import unknown_variables
from common.errors import ConfigError
from common.open_files import raise_open_files_limit
from mesh.config.schema import MeshConfig
from mesh.errors import InvalidRequest, MeshError
from mesh.pod.pod import Pod

logger = logging.getLogger(__name__)

_FEW_FILES = 4096


def run_pod(config: MeshConfig, *, warnings: Sequence[str] = ()) -> int:
    """Serve until SIGTERM or SIGINT and return the exit status: 0, or 1 after a part of the pod has failed.

    With one line on stderr it is 2 (invalid configuration) or 1 (cannot start).

    `warnings` about the configuration are logged first.
    """
    logs.set_up(as_json=config.log_json, level=config.log_level)
    for name in unknown_variables(os.environ, MeshConfig):
        logger.warning("the environment variable %s has no effect: docs/configuration.md lists the settings", name)
    for warning in warnings:
        logger.warning("%s", warning)
    limit = raise_open_files_limit()
    level = logging.WARNING if limit < _FEW_FILES else logging.INFO
    logger.log(level, "the limit of open files is %d; a request that is forwarded takes two", limit)
    try:
        status: int = uvloop.run(_serve(config))
        return status
    except (InvalidRequest, ConfigError) as error:
        print(f"repertory: {error}", file=sys.stderr)
        return 2
    except (MeshError, OSError) as error:
        print(f"repertory: {error}", file=sys.stderr)
        return 1


async def _serve(config: MeshConfig) -> int:
    pod = Pod(config)
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    reloads: set[asyncio.Task[None]] = set()

    def read_models_again() -> None:
        reload = asyncio.create_task(pod.apply_models_file())
        reloads.add(reload)
        reload.add_done_callback(reloads.discard)

    if config.models_file:
        loop.add_signal_handler(signal.SIGHUP, read_models_again)
    try:
        await pod.start()
        # Objects that exist now live as long as the process. Collecting them would delay every stream.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        await wait_for_any(asked_to_stop, pod.failed)
    finally:
        await pod.stop()
    return 1 if pod.failed.is_set() else 0
