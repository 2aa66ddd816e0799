"""Runs a write while its task does something else, without a task of its own."""

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


class StartedWrite:
    """A write that runs up to its first wait when it is created. Await it in the same task for its end; awaiting it again does nothing.

    A stream's next message is read meanwhile, so that the event loop learns of the end of both in one turn.
    """

    __slots__ = ("_has_ended", "_waits_for", "_write")

    def __init__(self, write: Coroutine[Any, Any, None]) -> None:
        self._write = write
        self._has_ended = False
        self._waits_for: asyncio.Future[Any] | None = None
        try:
            self._waits_for = write.send(None)
        except StopIteration:
            self._has_ended = True

    def __await__(self) -> Generator[asyncio.Future[Any] | None, None, None]:
        if self._has_ended:
            return
        if self._waits_for is None or not self._waits_for.done():
            yield self._waits_for
        self._has_ended = True
        yield from self._write.__await__()

    def close(self) -> None:
        """Abandon the write unless it has ended. An error of the transport is dropped."""
        waits_for = self._waits_for
        if not self._has_ended and waits_for is not None and not waits_for.cancel() and not waits_for.cancelled():
            waits_for.exception()  # asyncio logs an exception that is never retrieved
        self._write.close()
