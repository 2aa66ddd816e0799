"""Places adapters in their base's range: byte extents over slabs that are borrowed when a first extent touches them."""

from bisect import bisect_left, insort
from dataclasses import dataclass

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an extent would lie, and the places of the range that need a slab for it."""

    offset: int
    missing: tuple[int, ...]


class ExtentMap:
    """Extents of a range of `num_slabs` places of `slab_bytes`. A place has a slab while at least one extent touches it."""

    def __init__(self, slab_bytes: int, num_slabs: int) -> None:
        self._slab_bytes = slab_bytes
        self._limit = slab_bytes * num_slabs
        self._taken: list[tuple[int, int]] = []  # (offset, end), ascending
        self._slab_at: dict[int, int] = {}
        self._touching: dict[int, int] = {}

    @property
    def num_slabs(self) -> int:
        """Slabs under the range now."""
        return len(self._slab_at)

    def find(self, size_bytes: int) -> Placement | None:
        """Return the placement that needs the fewest further slabs, the lowest of those; None if the range is full. Takes nothing."""
        size_bytes = _aligned(size_bytes)
        best: Placement | None = None
        end_before = 0
        for start, end in (*self._taken, (self._limit, self._limit)):
            if start - end_before >= size_bytes:
                missing = tuple(place for place in self._places(end_before, size_bytes) if place not in self._slab_at)
                if best is None or len(missing) < len(best.missing):
                    best = Placement(end_before, missing)
            end_before = end
        return best

    def take(self, placement: Placement, size_bytes: int, slabs: list[int]) -> None:
        """Record an extent. `slabs` go to the missing places, in order. Raises ValueError if the placement is no longer free."""
        size_bytes = _aligned(size_bytes)
        extent = (placement.offset, placement.offset + size_bytes)
        at = bisect_left(self._taken, extent)
        overlaps = (at < len(self._taken) and self._taken[at][0] < extent[1]) or (
            at > 0 and self._taken[at - 1][1] > extent[0]
        )
        if overlaps or extent[1] > self._limit or len(slabs) != len(placement.missing):
            raise ValueError(f"bytes {extent[0]} to {extent[1]} of the range are not free")
        insort(self._taken, extent)
        for place, slab in zip(placement.missing, slabs, strict=True):
            self._slab_at[place] = slab
        for place in self._places(placement.offset, size_bytes):
            self._touching[place] = self._touching.get(place, 0) + 1

    def release(self, offset: int, size_bytes: int) -> dict[int, int]:
        """Remove an extent. Returns the places that no extent touches any more, with their slabs."""
        size_bytes = _aligned(size_bytes)
        self._taken.remove((offset, offset + size_bytes))
        freed = {}
        for place in self._places(offset, size_bytes):
            self._touching[place] -= 1
            if not self._touching[place]:
                del self._touching[place]
                freed[place] = self._slab_at.pop(place)
        return freed

    def freed_by(self, offset: int, size_bytes: int) -> int:
        """Return how many slabs `release` would free."""
        return sum(self._touching[place] == 1 for place in self._places(offset, _aligned(size_bytes)))

    def _places(self, offset: int, size_bytes: int) -> range:
        return range(offset // self._slab_bytes, -(-(offset + size_bytes) // self._slab_bytes))


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
