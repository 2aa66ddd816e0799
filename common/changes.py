"""A condition variable without data: tasks wait until something has changed. For one event loop."""

import asyncio
import contextlib


class Changes:
    """Counts changes and wakes the tasks that wait for the next one.

    A task that was busy when a change happened compares `version` with the version it saw last, so that no change is lost.
    """

    def __init__(self) -> None:
        self.version = 0
        self._event = asyncio.Event()

    def notify(self) -> None:
        self.version += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float | None = None, *, since: int | None = None) -> int:
        """Wait for a change after version `since` (default: the current one), at most `timeout_s`. Return the version."""
        if since is None or since == self.version:
            # asyncio.wait_for may swallow a cancellation before Python 3.12.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()
        return self.version
