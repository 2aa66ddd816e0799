"""How many requests a copy takes at once, where its runtime asks the mesh to keep to a limit (ModelMesh's limitModelConcurrency).

First come, first served; a queue of bounded length. Knows one copy's numbers; nothing of models or routes.
"""

import asyncio

from mesh.errors import Overloaded

_LEAST_IN_ALL = 16
_IN_ALL_FOR_ONE = 8


class ConcurrencyLimit:
    """`limit`: requests at once, at least 1. Running and waiting ones together are max(16, 8 × limit), as in ModelMesh."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.most = max(_LEAST_IN_ALL, _IN_ALL_FOR_ONE * limit)
        self.taken = 0  # running and waiting
        self._free = asyncio.Semaphore(limit)

    async def take(self, name: str) -> None:
        """Returns when it is this caller's turn. Raises Overloaded if too many wait already."""
        if self.taken >= self.most:
            raise Overloaded(
                f"model {name}: {self.taken} requests run or wait; its limit of {self.limit} at once allows {self.most}",
                retry_after_s=1,
            )
        self.taken += 1
        try:
            await self._free.acquire()
        except BaseException:
            self.taken -= 1
            raise

    def give_back(self) -> None:
        self.taken -= 1
        self._free.release()
