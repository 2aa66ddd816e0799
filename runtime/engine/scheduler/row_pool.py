"""Lends the rows of the engine's tables, which all models share. A sequence has a row from its admission to its end or preemption."""

from collections.abc import Callable


class RowPool:
    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        row = self._free.pop()
        self._taken.add(row)
        return row

    def release(self, row: int) -> None:
        self._taken.remove(row)
        self._free.append(row)

    def check(self) -> None:
        if len(self._free) + len(self._taken) != self.total or not self._taken.isdisjoint(self._free):
            raise AssertionError(f"{len(self._free)} free + {len(self._taken)} taken != {self.total} rows")


class ModelRows:
    """One model's view of the row pool. `close` is called for a released row before another model may take it."""

    def __init__(self, pool: RowPool, close: Callable[[int], None]) -> None:
        self._pool = pool
        self._close = close

    @property
    def total(self) -> int:
        return self._pool.total

    @property
    def free(self) -> int:
        return self._pool.free

    def take(self) -> int:
        return self._pool.take()

    def release(self, row: int) -> None:
        self._close(row)
        self._pool.release(row)
