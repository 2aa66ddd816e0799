"""Starts the other ranks of a tensor-parallel engine, sends them the device operations, and ends the engine when one of them is lost."""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from common.errors import ConfigError
from runtime.config.schema import EngineConfig
from runtime.engine.operations import Operation
from runtime.engine.ranks.messages import Alive, Finished, RankFailed, Ready, Report
from runtime.errors import LoadFailed, RepertoryError
from runtime.ipc.framing import FrameReader, encode_frame

SILENCE_S = 4.0  # a live rank reports every second
_START_S = 120.0
_SETTLE_S = 300.0  # rank 0 has finished its own part by then; a rank that reports that it lives may still be stuck in a driver call
_READ_BYTES = 1 << 16


class RankLost(Exception):
    """A rank died, stopped answering or failed. The text says which rank and why."""


class Followers:
    """The ranks 1 … N - 1 of an engine, as seen by rank 0.

    Args:
        on_lost: is called once, from a thread, when a rank is lost after the start. It must end this process: no collective operation ends without
            every rank.
        settle_s: how long a rank may take longer than rank 0 for a load or a change of its slabs. One that takes longer counts as lost.
    """

    def __init__(
        self, config: EngineConfig, on_lost: Callable[[RankLost], None], *, settle_s: float = _SETTLE_S
    ) -> None:
        """Start the processes. They import their libraries while this process imports its own."""
        self._on_lost = on_lost
        self._settle_s = settle_s
        self._folder = tempfile.TemporaryDirectory(prefix="repertory-ranks-")
        self.rendezvous = str(Path(self._folder.name) / "rendezvous")
        self._encoder = msgspec.msgpack.Encoder()
        self._closing = threading.Event()
        self._ranks = [self._start(rank, config) for rank in range(1, config.tensor_parallel)]

    def wait_ready(self) -> int:
        """Wait until every rank has its device. Returns the least number of slabs among them. Raises ConfigError or RankLost."""
        return min(rank.wait_ready() for rank in self._ranks)

    def send(self, operation: Operation) -> None:
        """Send a device operation to every rank."""
        frame = encode_frame(self._encoder, operation)
        for rank in self._ranks:
            rank.send(frame)

    def settle(self, model_id: str) -> RepertoryError | None:
        """Wait until every rank has finished the load of a model, or a change of its committed slabs (""). Returns the first error among them."""
        give_up_s = time.monotonic() + self._settle_s
        first: RepertoryError | None = None
        for rank in self._ranks:
            try:
                outcome = rank.outcomes.get(timeout=max(0.0, give_up_s - time.monotonic()))
            except queue.Empty:
                error = RankLost(
                    f"rank {rank.number} (pid {rank.process.pid}) has not finished within {self._settle_s:g} s"
                )
                self._lost(error)
                return LoadFailed(str(error), model=model_id)
            if outcome.code and first is None:
                first = LoadFailed(f"rank {rank.number}: {outcome.text}", model=model_id)
        return first

    def close(self) -> None:
        """End all ranks and wait for them."""
        self._closing.set()
        for rank in self._ranks:
            rank.close()
        self._folder.cleanup()

    def kill(self) -> None:
        """End all ranks at once."""
        self._closing.set()
        for rank in self._ranks:
            rank.process.kill()

    def _start(self, number: int, config: EngineConfig) -> "_Rank":
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-m",
            "runtime.engine.ranks",
            "--rank",
            str(number),
            "--size",
            str(config.tensor_parallel),
        ]
        command += ["--socket", str(theirs.fileno()), "--rendezvous", self.rendezvous]
        arena = f"{config.host_arena_path}.{number}" if config.host_arena_path else ""
        command += ["--config", msgspec.json.encode(msgspec.structs.replace(config, host_arena_path=arena)).decode()]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        theirs.close()
        return _Rank(number, process, ours, self._lost)

    def _lost(self, error: RankLost) -> None:
        if not self._closing.is_set():
            self._closing.set()
            self._on_lost(error)


class _Rank:
    """One follower's process, connection and reader thread."""

    def __init__(
        self,
        number: int,
        process: "subprocess.Popen[bytes]",
        connection: socket.socket,
        on_lost: Callable[[RankLost], None],
    ) -> None:
        self.number = number
        self.process = process
        self.outcomes: queue.SimpleQueue[Finished] = queue.SimpleQueue()
        self._connection = connection
        self._on_lost = on_lost
        self._started: queue.SimpleQueue[Ready | RankFailed] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"rank-{number}", daemon=True)
        self._reader.start()

    def wait_ready(self) -> int:
        try:
            answer = self._started.get(timeout=_START_S)
        except queue.Empty:
            raise RankLost(f"rank {self.number} did not start within {_START_S:.0f} s") from None
        if isinstance(answer, Ready):
            return answer.total_slabs
        if answer.cannot_start:
            raise ConfigError(answer.text)
        raise RankLost(f"rank {self.number} failed: {answer.text}")

    def send(self, frame: bytes) -> None:
        try:
            self._connection.sendall(frame)
        except OSError:
            self._on_lost(RankLost(self._end()))

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(timeout=5.0)
        self._connection.close()

    def _read(self) -> None:
        text = ""
        try:
            text = self._follow()
        except TimeoutError:
            text = f"rank {self.number} (pid {self.process.pid}) has not answered for {SILENCE_S:.0f} s"
        except (OSError, ValueError):
            text = ""
        text = text or self._end()
        self._started.put(RankFailed(text))
        self._on_lost(RankLost(text))

    def _follow(self) -> str:
        """Handle reports until the connection ends or the rank fails. Returns the rank's own reason, if it gave one."""
        frames = FrameReader(msgspec.msgpack.Decoder(Report))
        while data := self._connection.recv(_READ_BYTES):
            for report in frames.feed(data):
                match report:
                    case Ready():
                        self._connection.settimeout(SILENCE_S)
                        self._started.put(report)
                    case Finished():
                        self.outcomes.put(report)
                    case RankFailed(text):
                        self._started.put(report)
                        return f"rank {self.number} failed: {text}"
                    case Alive():
                        pass
        return ""

    def _end(self) -> str:
        try:
            status = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return f"rank {self.number} (pid {self.process.pid}) has closed its connection"
        cause = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {self.number} (pid {self.process.pid}) {cause}"


def end_engine(followers: Callable[[], Followers]) -> Callable[[RankLost], None]:
    """Return an `on_lost` that kills all ranks and ends this process, whose supervisor starts the engine again."""

    def on_lost(error: RankLost) -> None:
        sys.stderr.write(f"the tensor-parallel engine ends, so that all ranks start again: {error}\n")
        sys.stderr.flush()
        followers().kill()
        os._exit(1)

    return on_lost
