"""Runs a worker as a process, `python -m mesh.pod.worker_process`, with the link to its pod as standard input; and starts such processes."""

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import uvloop

from common import logs
from common.errors import ConfigError
from common.exit_status import CANNOT_START
from common.open_files import raise_open_files_limit
from common.parent import die_with_parent
from mesh.errors import MeshError
from mesh.pod.worker import Worker
from mesh.workers.link import Link
from mesh.workers.messages import Start, ToControl, ToWorker


@dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker and the control's end of the link to it. `wait` returns the exit status once it has ended."""

    link: Link[ToControl]
    kill: Callable[[], None]
    wait: Callable[[], Awaitable[int]]


async def start_worker_process() -> RunningWorker:
    """Start a process, without running Python between fork and exec, which crashes beside gRPC's threads. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "mesh.pod.worker_process"),
                stdin=theirs.fileno(),
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise

    def kill() -> None:
        if process.returncode is None:
            process.kill()

    return RunningWorker(await Link.over(ours, ToControl), kill, process.wait)


async def _serve() -> int:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # Service managers signal every process of a pod. Control has the worker leave when it has drained.
        loop.add_signal_handler(number, lambda: None)
    link: Link[ToWorker] = await Link.over(socket.socket(fileno=sys.stdin.fileno()), ToWorker)
    start = await anext(link.messages(), None)
    if not isinstance(start, Start):
        return 0  # the pod ended meanwhile
    logs.set_up(as_json=start.config.log_json, level=start.config.log_level)
    raise_open_files_limit()
    try:
        worker = Worker(link, start)
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        await worker.run()
    except (MeshError, ConfigError, OSError) as error:
        print(f"repertory: a worker cannot start: {error}", file=sys.stderr)
        return CANNOT_START
    return 0


if __name__ == "__main__":
    die_with_parent()  # also while the event loop hangs, which then does not see the end of the link
    sys.exit(uvloop.run(_serve()))
