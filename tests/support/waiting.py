"""Waiting for something to become true, in tests."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Fails if it does not."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, "it did not become true in time"
        await asyncio.sleep(0.01)


async def until_async(holds: Callable[[], Awaitable[object]], timeout_s: float = 10.0) -> None:
    """Like `until`, of a condition that has to be awaited."""
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.01)


def wait_until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Like `until`, for tests without an event loop."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, "it did not become true in time"
        time.sleep(0.02)
