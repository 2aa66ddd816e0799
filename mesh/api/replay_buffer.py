"""A gRPC caller's messages, read once and kept until the answer has begun, so that they can be sent a second time elsewhere.

Knows the server's context; nothing of models or targets.
"""

import asyncio
from typing import Any

import grpc.aio

ServerContext = grpc.aio.ServicerContext[Any, Any]


class ReplayBuffer:
    """`max_kept_bytes`: a caller that has sent more can't be replayed; then nothing is kept any longer. `only`: all that it sends, if that is known."""

    def __init__(self, context: ServerContext, max_kept_bytes: int, *, only: bytes | None = None) -> None:
        self._context = context
        self._left_bytes = max_kept_bytes
        self.only = only
        self._kept: list[bytes] = [] if only is None else [only]
        self._dropped = 0
        self._ended = only is not None
        self._keep = True
        self._reading: asyncio.Task[None] | None = None

    @property
    def replayable(self) -> bool:
        return self._dropped == 0

    async def message(self, index: int) -> bytes | None:
        """None: the caller has sent all. One that was dropped can't be had again."""
        while index >= self._dropped + len(self._kept):
            if self._ended:
                return None
            if self._reading is None:
                self._reading = asyncio.create_task(self._read())
            # a reader that is cancelled must not take the message with it
            await asyncio.shield(self._reading)
        message = self._kept[index - self._dropped]
        if not self._keep:
            del self._kept[: index - self._dropped + 1]
            self._dropped = index + 1
        return message

    def commit(self) -> None:
        """The answer has begun: nothing will be sent again."""
        self._keep = False

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        try:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                self._ended = True
                return
            self._kept.append(message)
            self._left_bytes -= len(message)
            if self._left_bytes < 0:
                self._keep = False
        finally:
            self._reading = None
