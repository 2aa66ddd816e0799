"""Runs one rank after the first: applies rank 0's device operations in their order, and decides nothing about a batch."""

import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import msgspec

from common.errors import ConfigError
from common.exit_status import CANNOT_START
from runtime.config.schema import EngineConfig
from runtime.engine.core.executor import OperationExecutor
from runtime.engine.import_stubs import light_imports
from runtime.engine.interfaces import Backend
from runtime.engine.operations import CommitSlabs, DecommitSlabs, FinishLoad, Operation
from runtime.engine.parallel.shard import Shard
from runtime.engine.ranks.messages import Alive, Finished, RankFailed, Ready, Report
from runtime.errors import RepertoryError
from runtime.ipc.framing import FrameReader, encode_frame

ALIVE_EVERY_S = 1.0
_IDLE_POLL_S = 0.05
_READ_BYTES = 1 << 20


class LeaderLink:
    """The follower's end of its connection to rank 0. `operations` receives None when rank 0 has closed it."""

    def __init__(self, connection: socket.socket) -> None:
        self.operations: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._connection = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, name="leader-reader", daemon=True).start()
        threading.Thread(target=self._beat, name="alive", daemon=True).start()

    def report(self, report: Report) -> None:
        """Send a report. Raises OSError if rank 0 has closed the connection."""
        with self._sending:
            self._connection.sendall(encode_frame(self._encoder, report))

    def _read(self) -> None:
        frames = FrameReader(msgspec.msgpack.Decoder(Operation))
        try:
            while data := self._connection.recv(_READ_BYTES):
                for operation in frames.feed(data):
                    self.operations.put(operation)
        except (OSError, ValueError):
            return
        finally:
            self.operations.put(None)

    def _beat(self) -> None:
        pause = threading.Event()
        try:
            while not pause.wait(ALIVE_EVERY_S):
                self.report(Alive())
        except OSError:
            return


def apply_all(link: LeaderLink, backend: Backend) -> None:
    """Apply operations until rank 0 closes the connection. Raises what the device raises."""
    executor = OperationExecutor(backend)
    while (operation := _next(link, lambda: backend.idle(lambda model_id: None))) is not None:
        match operation:
            case FinishLoad():
                link.report(_finish(executor, operation, RepertoryError))
            case CommitSlabs() | DecommitSlabs():
                link.report(_finish(executor, operation, Exception))
            case _:
                executor.apply(operation)


def _finish(executor: OperationExecutor, operation: Operation, expected: type[Exception]) -> Finished:
    """Apply an operation on whose end rank 0 waits. Raises errors that are not `expected`."""
    try:
        executor.apply(operation)
    except expected as error:
        if isinstance(error, RepertoryError):
            return Finished(error.code, error.message)
        return Finished("RESOURCE_EXHAUSTED", f"{type(error).__name__}: {error}")
    return Finished()


def _next(link: LeaderLink, idle: Callable[[], bool]) -> Operation | None:
    """Wait for the next operation, and do the backend's background work meanwhile."""
    while True:
        try:
            return link.operations.get(timeout=_IDLE_POLL_S)
        except queue.Empty:
            while link.operations.empty() and idle():
                pass


def run(connection: socket.socket, shard: Shard, rendezvous: str, config: EngineConfig) -> int:
    """Join the group and follow rank 0. Returns the exit status."""
    link = LeaderLink(connection)
    try:
        with light_imports():
            from runtime.engine.device.backend import import_for_loads, make_backend

            import_for_loads(config)
        backend = make_backend(config, shard, rendezvous)
        link.report(Ready(backend.total_slabs))
        apply_all(link, backend)
    except ConfigError as error:
        link.report(RankFailed(error.message, cannot_start=True))
        return CANNOT_START
    except OSError:
        return 1
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        link.report(RankFailed(f"{type(error).__name__}: {error}"))
        return 1
    return 0
