"""A supervised process: started, started again with growing pauses when it dies, killed first if it hangs. Knows nothing of what it does."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections.abc import Sequence

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_USAGE = 2  # a configuration that can't be
_STEADY_S = 30.0  # a child that lived this long is well: its next pause is the first again
_PAUSES_S = (0.2, 1.0, 3.0, 10.0)
_LOOK_S = 10.0  # between questions, and the longest wait for an answer
_LOOKS = 3  # a minute in all


class SupervisedProcess:
    """One supervised process: started, started again when it dies or hangs, stopped with SIGTERM.

    `http`: where it answers HTTP, "unix:PATH" or "HOST:PORT". Once it has answered, `looks` questions in a row without an answer, one every
    `look_s`, mean that it hangs.
    """

    def __init__(
        self, name: str, command: Sequence[str], http: str = "", *, look_s: float = _LOOK_S, looks: int = _LOOKS
    ) -> None:
        self.name = name
        self._command = command
        self._http = http
        self._look_s = look_s
        self._looks = looks
        self._process: asyncio.subprocess.Process | None = None
        self._deaths = 0

    async def run(self, stopping: asyncio.Event) -> int:
        """Keep it running until `stopping`; returns its exit status if it can't even start. One that once ran is started for ever:
        what it misses now (a store that is away, a disk that is full) may come back."""
        well = False
        while True:
            started_s = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *self._command, env=_environment(), preexec_fn=_die_with_parent, start_new_session=True
            )
            if stopping.is_set():
                # `stop` came while it was being started, and found nothing to stop
                self._process.terminate()
            watching = asyncio.create_task(self._kill_if_it_hangs(self._process))
            status = await self._process.wait()
            watching.cancel()
            if stopping.is_set():
                return 0
            lived_s = time.monotonic() - started_s
            self._deaths = 1 if lived_s > _STEADY_S else self._deaths + 1
            if status == _USAGE:
                return status  # it would say the same again
            well = well or status != 1 or lived_s > _STEADY_S
            if not well and self._deaths >= 2:
                return status  # what it can't start without isn't there
            pause_s = _PAUSES_S[min(self._deaths, len(_PAUSES_S)) - 1]
            logger.warning("the %s process ended with status %d; starting it again in %g s", self.name, status, pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await stopping.wait()
                return 0

    async def stop(self, grace_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            self.kill()

    def kill(self) -> None:
        """At once, whatever it does."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _kill_if_it_hangs(self, process: asyncio.subprocess.Process) -> None:
        """A process that is alive and does nothing is worse than a dead one: nobody starts it again."""
        missed: int | None = None  # None: it hasn't answered yet, and may take its time to start
        while self._http and (missed or 0) < self._looks:
            await asyncio.sleep(self._look_s)
            if await answers(self._http, self._look_s):
                missed = 0
            elif missed is not None:
                missed += 1
        if self._http:
            logger.error("the %s process hangs: it hasn't answered %d times; ending it", self.name, self._looks)
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def answers(address: str, timeout_s: float) -> bool:
    """Whether whatever listens there answers HTTP at all."""
    return await status_of(address, "/health", timeout_s) is not None


async def status_of(address: str, path: str, timeout_s: float) -> int | None:
    """The status that a GET of `path` is answered with; None: it isn't answered with HTTP, or not in time."""
    try:
        async with asyncio.timeout(timeout_s):
            if address.startswith("unix:"):
                reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
            else:
                host, _, port = reachable(address).rpartition(":")
                reader, writer = await asyncio.open_connection(host.strip("[]"), port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: supervisor\r\nConnection: close\r\n\r\n".encode())
                protocol, _, rest = (await reader.readline()).partition(b" ")
                return int(rest[:3]) if protocol.startswith(b"HTTP/") and rest[:3].isdigit() else None
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None


def reachable(address: str) -> str:
    """One that listens everywhere listens here."""
    host, colon, port = address.rpartition(":")
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]"}.get(host, host) + colon + port


def _environment() -> dict[str, str]:
    """The children's: REPERTORY_… variables were read here, and some of their names mean something else to a child."""
    return {name: value for name, value in os.environ.items() if not name.startswith("REPERTORY_")}


def _die_with_parent() -> None:
    # A supervisor that is killed outright must not leave a runtime holding the GPU.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
