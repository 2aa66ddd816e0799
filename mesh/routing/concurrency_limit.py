"""Limits the concurrent requests of one copy, where its runtime requires it (ModelMesh's limitModelConcurrency)."""

import asyncio
from math import inf

from mesh.errors import Overloaded

_MIN_ADMITTED = 16
_ADMITTED_PER_SLOT = 8


class ConcurrencyLimit:
    """A first-come, first-served semaphore with a bounded queue.

    `limit`: concurrent requests, at least 1. `max_in_flight`: requests that run or wait; 0 stands for ModelMesh's max(16, 8 × limit) and
    -1 for any number.
    """

    def __init__(self, limit: int, max_in_flight: int = 0) -> None:
        self.limit = limit
        default = max(_MIN_ADMITTED, _ADMITTED_PER_SLOT * limit)
        self.max_admitted: float = inf if max_in_flight < 0 else max_in_flight or default
        self.num_admitted = 0  # running and waiting
        self._slots = asyncio.Semaphore(limit)

    async def acquire(self, name: str) -> None:
        """Return when the request may run. Raises Overloaded if too many wait already."""
        if self.num_admitted >= self.max_admitted:
            raise Overloaded(
                f"{self.num_admitted} requests run or wait; its limit of {self.limit} at once allows {self.max_admitted}",
                model=name,
                limit=self.max_admitted,
                value=self.num_admitted,
                retry_after_s=1,
            )
        self.num_admitted += 1
        try:
            await self._slots.acquire()
        except BaseException:
            self.num_admitted -= 1
            raise

    def release(self) -> None:
        self.num_admitted -= 1
        self._slots.release()
