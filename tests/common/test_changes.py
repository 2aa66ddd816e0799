"""Changes: no change is lost between two waits."""

import asyncio

from common.changes import Changes


async def test_wait_returns_at_once_for_a_missed_change() -> None:
    changes = Changes()
    seen = changes.version
    changes.notify()
    async with asyncio.timeout(1):
        assert await changes.wait(since=seen) == seen + 1


async def test_notify_wakes_every_waiter() -> None:
    changes = Changes()
    waiters = [asyncio.create_task(changes.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    changes.notify()
    async with asyncio.timeout(1):
        assert await asyncio.gather(*waiters) == [1, 1, 1]


async def test_wait_ends_with_its_timeout() -> None:
    assert await Changes().wait(0.01) == 0
