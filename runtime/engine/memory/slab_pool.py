"""Accounts for slabs of device memory: at any time each slab is free, lent to one owner, or not committed.

A slab that is not committed has no physical memory: another engine of the device has it, or nobody.
"""

from collections.abc import Sequence


class SlabPool:
    """`total` slabs with ids 0 … total-1, of which `committed` have memory (None = all). An owner is any name ("model/weights", "model/kv")."""

    def __init__(self, total: int, committed: int | None = None) -> None:
        self.total = total
        at_first = total if committed is None else committed
        self._free = list(range(at_first - 1, -1, -1))
        self._uncommitted = list(range(total - 1, at_first - 1, -1))
        self._owner_of: dict[int, str] = {}
        self._lent: dict[str, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def committed(self) -> int:
        """Slabs with memory, free or lent."""
        return self.total - len(self._uncommitted)

    @property
    def num_lent(self) -> int:
        return len(self._owner_of)

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

    def uncommitted(self, most: int) -> list[int]:
        """Return up to `most` slabs that could be committed."""
        return self._uncommitted[-most:] if most > 0 else []

    def commit(self, slabs: Sequence[int]) -> None:
        """Add slabs that have memory from now on. Raises ValueError if one has had it before."""
        for slab in slabs:
            self._uncommitted.remove(slab)
            self._free.append(slab)

    def decommit(self, count: int) -> list[int]:
        """Remove `count` free slabs, or all free ones if there are fewer, and return their ids. Their memory is to be released."""
        slabs = [self._free.pop() for _ in range(min(count, len(self._free)))]
        self._uncommitted += slabs
        return slabs

    def check(self) -> None:
        """free + lent + uncommitted = total, and no slab twice."""
        if len(self._free) + len(self._owner_of) + len(self._uncommitted) != self.total:
            raise AssertionError(
                f"{len(self._free)} free + {len(self._owner_of)} lent + {len(self._uncommitted)} uncommitted != {self.total} slabs"
            )
        if sum(self._lent.values()) != len(self._owner_of) or not self._owner_of.keys().isdisjoint(self._free):
            raise AssertionError(f"slab accounts disagree: {self._lent}")
        if not {*self._free, *self._owner_of}.isdisjoint(self._uncommitted):
            raise AssertionError("a slab without memory is free or lent")
