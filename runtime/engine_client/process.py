"""Runs one engine process: starts it, exchanges messages with it, and reports how it ended.

The front process listens on a unix socket and the engine connects to it. An engine sends its figures every second, so a silent engine hangs.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec

from runtime.config.schema import EngineConfig
from runtime.engine_client.restart_policy import Silence
from runtime.errors import Unavailable
from runtime.ipc.framing import FrameReader, FrameTooLarge, encode_frame
from runtime.ipc.messages import Command, Event

_EXIT_WAIT_S = 10.0
_LISTEN_S = 1.0


def engine_command(socket_path: Path, config: EngineConfig, crash_marker_path: Path) -> list[str]:
    """Return the argument vector of a real engine."""
    return [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "runtime.engine",
        "--socket",
        str(socket_path),
        "--config",
        msgspec.json.encode(config).decode(),
        "--crash-marker",
        str(crash_marker_path),
    ]


class FrameProtocol(asyncio.Protocol):
    """Receives events and sends commands. `on_event` runs in the event loop, in the order of arrival."""

    def __init__(
        self, on_event: Callable[[Event], None], on_connected: Callable[[], None], on_lost: Callable[[], None]
    ) -> None:
        self._on_event = on_event
        self._on_connected = on_connected
        self._on_lost = on_lost
        decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._reader = FrameReader(decoder)
        self._encoder = msgspec.msgpack.Encoder()
        self._transport: asyncio.Transport | None = None
        self.heard = False  # set by any received byte, reset by the reader of this flag

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(
            "asyncio.Transport", transport
        )  # uvloop's transport does not derive from asyncio.Transport
        self._on_connected()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            for event in self._reader.feed(data):
                self._on_event(event)
        except FrameTooLarge:
            self.close()

    def send(self, command: Command) -> bool:
        """Queue one command. Return False if the engine is not connected. Raises FrameTooLarge."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(encode_frame(self._encoder, command))
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class EngineProcess:
    """A running engine, made by `launch`. `ended` is set when the process has exited, and `exit_text` then says how.

    `lost` is set when the connection has closed. The process may still be writing a crash report then.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, protocol: FrameProtocol, server: asyncio.Server, lost: asyncio.Event
    ) -> None:
        self._process = process
        self._protocol = protocol
        self._server = server
        self.pid = process.pid
        self.ended = asyncio.Event()
        self.lost = lost
        self.exit_text = ""
        self._waiter = asyncio.create_task(self._wait())
        self._reaper: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._hung_text = ""

    @classmethod
    async def launch(
        cls, command: Sequence[str], socket_path: Path, on_event: Callable[[Event], None], *, connect_timeout_s: float
    ) -> "EngineProcess":
        """Start a process and wait until it has connected. Raises Unavailable if it exits first or takes too long."""
        loop = asyncio.get_running_loop()
        connected = asyncio.Event()
        lost = asyncio.Event()
        protocol = FrameProtocol(on_event, connected.set, lost.set)
        server = await loop.create_unix_server(lambda: protocol, str(socket_path), backlog=1)
        process: asyncio.subprocess.Process | None = None
        try:
            # In a session of its own, Ctrl-C in a terminal reaches only the front process, which lets streams finish.
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
            engine = cls(process, protocol, server, lost)
            waits = [asyncio.create_task(connected.wait()), asyncio.create_task(engine.ended.wait())]
            try:
                await asyncio.wait(waits, timeout=connect_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            if not connected.is_set():
                await engine.kill()
                raise Unavailable(
                    f"the engine did not start: {engine.exit_text or f'it did not connect within {connect_timeout_s:g} s'}"
                )
            engine._reaper = asyncio.create_task(engine._reap())
            return engine
        except BaseException:
            server.close()
            if process is not None and process.returncode is None:
                _kill_group(process.pid)
            raise

    def send(self, command: Command) -> bool:
        return self._protocol.send(command)

    def watch(self, limit_s: float, has_work: Callable[[], bool]) -> None:
        """Kill the engine once it has work and has sent nothing for `limit_s`; never if that is not positive."""
        if limit_s > 0:
            self._watcher = asyncio.create_task(self._watch(limit_s, has_work))

    async def _watch(self, limit_s: float, has_work: Callable[[], bool]) -> None:
        look_s = min(_LISTEN_S, limit_s / 10)
        silence = Silence(limit_s)
        is_hung = False
        while not is_hung:
            self._protocol.heard = False
            await asyncio.sleep(look_s)
            is_hung = silence.exceeds_limit(look_s, heard=self._protocol.heard, has_work=has_work())
        self._hung_text = f"sent nothing for {limit_s:g} s and was killed"
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGABRT)  # The fault handler prints where the process hangs.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_WAIT_S):
                await self.ended.wait()
        await self.kill()

    async def kill(self) -> None:
        """Kill the process group and wait until the process has exited."""
        if self._process.returncode is None:
            _kill_group(self._process.pid)
        await self.ended.wait()

    async def _reap(self) -> None:
        # An engine that has closed its socket must exit.
        await self.lost.wait()
        try:
            async with asyncio.timeout(_EXIT_WAIT_S):
                await self.ended.wait()
        except TimeoutError:
            await self.kill()

    async def _wait(self) -> None:
        code = await self._process.wait()
        if code < 0:
            try:
                self.exit_text = f"was killed by {signal.Signals(-code).name}"
            except ValueError:
                self.exit_text = f"was killed by signal {-code}"
        else:
            self.exit_text = f"exited with code {code}"
        if self._watcher is not None:
            self._watcher.cancel()
        self.exit_text = self._hung_text or self.exit_text
        self._server.close()
        self._protocol.close()
        self.ended.set()


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
