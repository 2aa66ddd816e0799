"""Accounts for slabs of device memory: at any time each slab is free or lent to one owner."""

from collections.abc import Sequence


class SlabPool:
    """`total` slabs with ids 0 … total-1. An owner is any name ("model/weights", "model/kv")."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owner_of: dict[int, str] = {}
        self._lent: dict[str, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def lent(self, owner: str) -> int:
        return self._lent.get(owner, 0)

    def lend(self, owner: str, count: int) -> list[int] | None:
        """Lend `count` slabs and return their ids. Returns None, and lends nothing, if there are fewer."""
        if count > len(self._free):
            return None
        slabs = [self._free.pop() for _ in range(count)]
        for slab in slabs:
            self._owner_of[slab] = owner
        self._lent[owner] = self._lent.get(owner, 0) + count
        return slabs

    def release(self, owner: str, slabs: Sequence[int]) -> None:
        """Return slabs to the pool. Raises ValueError if one is not lent to `owner`."""
        for slab in slabs:
            if self._owner_of.get(slab) != owner:
                raise ValueError(f"slab {slab} is lent to {self._owner_of.get(slab)!r}, not to {owner!r}")
            del self._owner_of[slab]
            self._free.append(slab)
        left = self._lent.get(owner, 0) - len(slabs)
        if left:
            self._lent[owner] = left
        else:
            self._lent.pop(owner, None)

    def check(self) -> None:
        """free + lent = total, and no slab twice."""
        if len(self._free) + len(self._owner_of) != self.total:
            raise AssertionError(f"{len(self._free)} free + {len(self._owner_of)} lent != {self.total} slabs")
        if sum(self._lent.values()) != len(self._owner_of) or not self._owner_of.keys().isdisjoint(self._free):
            raise AssertionError(f"slab accounts disagree: {self._lent}")
