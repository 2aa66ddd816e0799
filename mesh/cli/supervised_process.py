"""Supervises one process: restarts it with exponential pauses when it exits, and kills it when it stops answering."""

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.exit_status import CANNOT_START, USAGE
from common.parent import die_with_parent
from mesh.cli import leftovers

logger = logging.getLogger(__name__)

_STABLE_AFTER_S = 30.0  # a process that ran this long resets the count of failures
_BACKOFF_S = (0.2, 1.0, 3.0, 10.0)
_PROBE_INTERVAL_S = 10.0  # also the timeout of a probe
_MAX_FAILED_PROBES = 3  # with timeouts, a hang is detected within a minute


class SupervisedProcess:
    """Starts a process, restarts it when it exits or hangs, and stops it with SIGTERM.

    `http` is the address (`unix:PATH` or `HOST:PORT`) of its HTTP server, which is probed every `probe_interval_s`. Once the server has answered,
    `max_failed_probes` failed probes in a row mean that the process hangs. Without an address, hangs are not detected. `record` names the file in
    which `leftovers` finds the process later. `tls`: the HTTP server expects TLS. `environment` is added to this process's environment without its REPERTORY_ variables.
    `backoff_s` are the pauses before the first restarts; the last one is repeated.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        http: str = "",
        record: Path | None = None,
        *,
        tls: bool = False,
        environment: Mapping[str, str] | None = None,
        probe_interval_s: float = _PROBE_INTERVAL_S,
        max_failed_probes: int = _MAX_FAILED_PROBES,
        backoff_s: Sequence[float] = _BACKOFF_S,
    ) -> None:
        self.name = name
        self._command = command
        self._http = http
        self._tls = tls
        self._record = record
        self._environment = {**_plain_environment(), **(environment or {})}
        self._probe_interval_s = probe_interval_s
        self._max_failed_probes = max_failed_probes
        self._backoff_s = backoff_s
        self._process: asyncio.subprocess.Process | None = None
        self._num_failures = 0

    async def run(self, stopping: asyncio.Event) -> int:
        """Keep the process running until `stopping` is set. Return 0, or its exit status if it can never start.

        A process that has run before is restarted without limit, since an unreachable store or a full disk may recover.
        """
        has_run = False
        while True:
            started_s = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environment, preexec_fn=die_with_parent, start_new_session=True
            )
            if self._record is not None:
                leftovers.record(self._record, self._process.pid)
            if stopping.is_set():
                # `stop` was called while the process was being created.
                self._process.terminate()
            watcher = asyncio.create_task(self._kill_if_hung(self._process))
            status = await self._process.wait()
            watcher.cancel()
            if stopping.is_set():
                return 0
            ran_s = time.monotonic() - started_s
            self._num_failures = 1 if ran_s > _STABLE_AFTER_S else self._num_failures + 1
            if status in (USAGE, CANNOT_START):
                return status  # neither the configuration nor the machine changes by a restart
            has_run = has_run or status != 1 or ran_s > _STABLE_AFTER_S
            if not has_run and self._num_failures >= 2:
                return status
            pause_s = self._backoff_s[min(self._num_failures, len(self._backoff_s)) - 1]
            logger.warning("the %s process exited with status %d; restarting it in %g s", self.name, status, pause_s)
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
        """Kill the process at once."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _kill_if_hung(self, process: asyncio.subprocess.Process) -> None:
        """Kill the process once it no longer answers probes, so that it is restarted."""
        missed: int | None = None  # None until the first answer: starting may take any time
        while self._http and (missed or 0) < self._max_failed_probes:
            await asyncio.sleep(self._probe_interval_s)
            if await answers(self._http, self._probe_interval_s, tls=self._tls):
                missed = 0
            elif missed is not None:
                missed += 1
        if self._http:
            logger.error(
                "the %s process hangs: %d health checks in a row failed; killing it", self.name, self._max_failed_probes
            )
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def answers(address: str, timeout_s: float, *, tls: bool = False) -> bool:
    """Return whether a server answers HTTP at an address, with whatever status."""
    return await status_of(address, "/health", timeout_s, tls=tls) is not None


async def status_of(address: str, path: str, timeout_s: float, *, tls: bool = False) -> int | None:
    """Return the HTTP status of a GET of `path`, or None without a valid answer within `timeout_s`.

    `tls`: the server expects TLS. Its certificate is not checked: it is made for the name that callers use.
    """
    context = _unchecked() if tls else None
    name = "" if tls else None
    try:
        async with asyncio.timeout(timeout_s):
            if address.startswith("unix:"):
                reader, writer = await asyncio.open_unix_connection(
                    address.removeprefix("unix:"), ssl=context, server_hostname=name
                )
            else:
                host, _, port = reachable(address).rpartition(":")
                reader, writer = await asyncio.open_connection(
                    host.strip("[]"), port, ssl=context, server_hostname=name
                )
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: supervisor\r\nConnection: close\r\n\r\n".encode())
                protocol, _, rest = (await reader.readline()).partition(b" ")
                return int(rest[:3]) if protocol.startswith(b"HTTP/") and rest[:3].isdigit() else None
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None


def _unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def reachable(address: str) -> str:
    """Return an address to connect to: the loopback address in place of a wildcard."""
    host, colon, port = address.rpartition(":")
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]"}.get(host, host) + colon + port


def _plain_environment() -> dict[str, str]:
    """Return the environment without REPERTORY_… variables, which `serve` has read and which would override a process's file."""
    return {name: value for name, value in os.environ.items() if not name.startswith("REPERTORY_")}
