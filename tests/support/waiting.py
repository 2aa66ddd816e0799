"""Waiting for something to become true, in tests."""

import asyncio
import time
from collections.abc import Callable


async def until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Fails if it doesn't."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, "it did not become true in time"
        await asyncio.sleep(0.01)
