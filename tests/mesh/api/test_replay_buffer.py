"""A refusal waits for the caller's first message, because gRPC loses the status of a call that ends before its message is sent."""

import asyncio
import time
from typing import cast

from mesh.api.replay_buffer import ReplayBuffer, ServerContext
from mesh.api.request_memory import RequestMemory


class Caller:
    """Sends one message when `sends` is set."""

    def __init__(self) -> None:
        self.sends = asyncio.Event()

    async def read(self) -> bytes:
        await self.sends.wait()
        return b"late"


def buffer_of(caller: Caller, *, limit_bytes: int = 100) -> ReplayBuffer:
    return ReplayBuffer(cast("ServerContext", caller), RequestMemory(limit_bytes).hold(), 100)


async def test_take_first_returns_with_the_message_and_keeps_it() -> None:
    caller = Caller()
    buffer = buffer_of(caller)
    waiting = asyncio.create_task(buffer.take_first(20.0))
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    caller.sends.set()
    await waiting
    assert buffer.received_bytes == len(b"late")
    assert await buffer.message(0) == b"late"
    buffer.close()


async def test_take_first_gives_up_and_ignores_a_message_that_does_not_fit() -> None:
    silent = buffer_of(Caller())
    begun_s = time.monotonic()
    await silent.take_first(0.01)
    assert time.monotonic() - begun_s < 10
    silent.close()
    caller = Caller()
    caller.sends.set()
    full = buffer_of(caller, limit_bytes=1)
    await full.take_first(20.0)
    assert full.received_bytes == 0
    full.close()
