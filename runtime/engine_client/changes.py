"""A bell that any number of tasks may wait for: something changed. Carries no data and remembers only how often it rang."""

import asyncio


class Changes:
    """`notify` wakes all waiters; a waiter that was busy meanwhile sees it by the count. Event loop only."""

    def __init__(self) -> None:
        self.count = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        self.count += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_past(self, count: int, timeout_s: float | None = None) -> int:
        """Wait until it has rung more than `count` times or the time is up; returns the present count."""
        if self.count == count:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                async with asyncio.timeout(timeout_s):
                    await waiter
            except TimeoutError:
                pass
            finally:
                self._waiters.discard(waiter)
        return self.count
