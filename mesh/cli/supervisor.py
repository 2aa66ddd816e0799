"""Runs supervised processes as one program: they start together, and end in order on a signal."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from mesh.cli.supervised_process import SupervisedProcess

logger = logging.getLogger(__name__)

_GRACE_RESERVE_S = 5.0


class Supervisor:
    """Runs processes until a signal, and ends them one after another: at most `grace_s` after the first signal, at once after a second one.

    `processes` are in the order in which they end. `announce` runs beside them and reports when they are ready. `gets_sighup`: the process that
    SIGHUP is passed to, after which the mesh reads its models file again.
    """

    def __init__(
        self,
        *processes: SupervisedProcess,
        grace_s: float,
        announce: Callable[[], Coroutine[Any, Any, object]],
        gets_sighup: SupervisedProcess | None = None,
    ) -> None:
        self._processes = processes
        self._grace_s = grace_s
        self._announce = announce
        self._gets_sighup = gets_sighup
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Return 0, or the exit status of a process that can never start."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_signal)
        if self._gets_sighup is not None:
            loop.add_signal_handler(signal.SIGHUP, self._gets_sighup.send_signal, signal.SIGHUP)
        processes = [asyncio.create_task(process.run(self._stopping)) for process in reversed(self._processes)]
        announce = asyncio.create_task(self._announce())
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([*processes, stop], return_when=asyncio.FIRST_COMPLETED)
        failed = next((task.result() for task in processes if task.done()), 0)
        self._stopping.set()
        announce.cancel()
        for process in self._processes:
            await process.stop(self._grace_s + _GRACE_RESERVE_S)
        await asyncio.gather(*processes, stop, announce, return_exceptions=True)
        return failed

    def _handle_signal(self) -> None:
        if self._stopping.is_set():
            for process in self._processes:
                process.kill()
            return
        self._stopping.set()
        logger.info(
            "stopping: running requests have %g s to finish; send the signal again to stop at once", self._grace_s
        )
