"""The progress and the cancellation of one pull or pack. Safe to use from any thread."""

import contextlib
import socket
import threading
import time
import weakref

from runtime.errors import Cancelled
from runtime.models.model_state import Phase, Progress, Report

_SHORTEST_S = 0.1


class PullJob:
    """Call `check` between pieces of work and `say` after them. Reports that repeat the text are limited to ten per second."""

    def __init__(self, report: Report, uri: str = "") -> None:
        self.uri = uri.partition("?")[0]  # of the source; a query may be a signature
        self._report = report
        self._cancelled = threading.Event()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._last_s = 0.0
        self._last_text = ""

    def cancel(self) -> None:
        """Make the work end: at its next check, or at once where it waits for a connection that it has opened."""
        self._cancelled.set()
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def opened(self, connection: socket.socket) -> None:
        """Have a connection shut down when the work is cancelled. Raises Cancelled if it is already."""
        with self._lock:
            self._sockets.add(connection)
        self.check()

    def check(self) -> None:
        """Raise Cancelled once `cancel` was called."""
        if self._cancelled.is_set():
            raise Cancelled("the load was cancelled")

    def wait(self, seconds: float) -> None:
        """Sleep for at most `seconds`. Raises Cancelled as soon as the work is cancelled."""
        self._cancelled.wait(seconds)
        self.check()

    def say(self, phase: Phase, done_bytes: int, total_bytes: int, text: str) -> None:
        now_s = time.monotonic()
        if text == self._last_text and done_bytes != total_bytes and now_s - self._last_s < _SHORTEST_S:
            return
        self._last_s, self._last_text = now_s, text
        self._report(Progress(phase, done_bytes, total_bytes, text))
