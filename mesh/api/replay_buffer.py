"""Keeps a gRPC client's messages until the response has begun, so that they can be sent again to another target."""

import asyncio
import contextlib
from typing import Any

import grpc.aio

from mesh.api.request_memory import HeldMemory
from mesh.errors import MeshError

ServerContext = grpc.aio.ServicerContext[Any, Any]


class ReplayBuffer:
    """Keeps the messages of one call.

    `memory` accounts for the kept messages. A request of more than `max_kept_bytes` is not kept and cannot be replayed. `only`: the message of a method
    that takes exactly one.
    """

    __slots__ = (
        "_context",
        "_dropped",
        "_ended",
        "_keep",
        "_kept",
        "_left_bytes",
        "_memory",
        "_reading",
        "only",
        "received_bytes",
    )

    def __init__(
        self, context: ServerContext, memory: HeldMemory, max_kept_bytes: int, *, only: bytes | None = None
    ) -> None:
        self._context = context
        self._memory = memory
        self._left_bytes = max_kept_bytes
        self.only = only
        self.received_bytes = len(only) if only is not None else 0
        self._kept: list[bytes] = [] if only is None else [only]
        self._dropped = 0
        self._ended = only is not None
        self._keep = True
        self._reading: asyncio.Task[None] | None = None

    def admit(self) -> None:
        """Account for the only message. Raises Overloaded if the pod holds too many bytes of requests."""
        self._memory.add(len(self.only) if self.only is not None else 0)

    @property
    def replayable(self) -> bool:
        return self._dropped == 0

    async def message(self, index: int) -> bytes | None:
        """Return a message by its index; None after the last one. A dropped message cannot be read again."""
        while index >= self._dropped + len(self._kept):
            if self._ended:
                return None
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())
                self._reading.add_done_callback(_retrieve)
            # A cancelled reader must not lose the message.
            await asyncio.shield(self._reading)
        message = self._kept[index - self._dropped]
        if not self._keep:
            num_dropped = index - self._dropped + 1
            self._memory.remove(sum(len(dropped) for dropped in self._kept[:num_dropped]))
            del self._kept[:num_dropped]
            self._dropped = index + 1
        return message

    async def take_first(self, timeout_s: float) -> None:
        """Wait for the first message, or until there will be none. A client of grpc.aio loses the status of a call that ends before that."""
        with contextlib.suppress(TimeoutError, MeshError, grpc.aio.BaseError, asyncio.InvalidStateError):
            async with asyncio.timeout(timeout_s):
                await self.message(self._dropped)

    def commit(self) -> None:
        """Stop keeping messages: the response has begun."""
        self._keep = False

    def close(self) -> None:
        self._memory.close()
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        try:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                self._ended = True
                return
            self._memory.add(len(message))
            self._kept.append(message)
            self.received_bytes += len(message)
            self._left_bytes -= len(message)
            if self._left_bytes < 0:
                self._keep = False
        finally:
            self._reading = None


def _retrieve(task: asyncio.Task[None]) -> None:
    """Retrieve the exception of a read. If the call has ended meanwhile, the read is not awaited, and asyncio would log a traceback."""
    if not task.cancelled():
        task.exception()
