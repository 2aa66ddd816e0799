"""Allocates one model's KV blocks from the slabs that it borrows.

A block is free, used, or idle: an idle block holds cached content that no running sequence reads (prefix.py).
"""

from typing import Protocol

from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.slab_pool import SlabPool


class KvMapper(Protocol):
    """Takes the changes of the KV range, as operations to apply before the next step."""

    def map_kv(self, index: int, slab: int) -> None: ...

    def unmap_kv(self, index: int) -> None: ...


class BlockPool:
    """Hands out page ids, densest slab first; borrows a slab when all are full and returns one as soon as it is empty."""

    def __init__(self, geometry: KvGeometry, pool: SlabPool, owner: str, mapper: KvMapper) -> None:
        self.geometry = geometry
        self._pool = pool
        self._owner = owner
        self._mapper = mapper
        self._slab_at: dict[int, int] = {}  # place in the KV range → slab id
        self._places = list(range(geometry.max_slabs - 1, -1, -1))
        self._free_in: dict[int, list[int]] = {}  # place → free page ids
        self._idle_in: dict[int, int] = {}  # place → idle blocks
        # by_room[r] holds the places with r free blocks
        self._by_room: list[dict[int, None]] = [{} for _ in range(geometry.blocks_per_slab + 1)]
        self._least_room = 1
        self._num_free = 0
        self._num_idle = 0
        self._idle_slabs = 0

    @property
    def slabs(self) -> int:
        return len(self._slab_at)

    @property
    def free_blocks(self) -> int:
        """Free blocks in slabs that the model holds already."""
        return self._num_free

    @property
    def idle_blocks(self) -> int:
        return self._num_idle

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        return len(self._slab_at) * self.geometry.blocks_per_slab - self._num_free - self._num_idle

    def obtainable(self) -> int:
        """Return how many blocks `take` could allocate now."""
        slabs = min(self._pool.free, len(self._places))
        return self._num_free + slabs * self.geometry.blocks_per_slab

    def take(self) -> int | None:
        """Allocate a block. Returns its page id, or None if there is no free slab."""
        if not self._num_free and not self._borrow():
            return None
        room = self._least_room
        while not self._by_room[room]:
            room += 1
        places = self._by_room[room]
        place, _ = places.popitem()
        self._idle_slabs -= self._is_idle(place)
        page = self._free_in[place].pop()
        self._by_room[room - 1][place] = None
        self._least_room = max(room - 1, 1)
        self._num_free -= 1
        return page

    def free(self, page: int) -> None:
        """Free a used block. Its slab is returned to the pool if it was the last block in use there."""
        geometry = self.geometry
        place = page // geometry.pages_per_slab
        free = self._free_in[place]
        room = len(free)
        free.append(page)
        self._num_free += 1
        del self._by_room[room][place]
        if room + 1 == geometry.blocks_per_slab:
            self._return(place)
            return
        self._by_room[room + 1][place] = None
        self._least_room = min(self._least_room, room + 1)
        self._idle_slabs += self._is_idle(place)

    def set_idle(self, page: int) -> None:
        """Mark a used block as idle: its content is kept."""
        place = page // self.geometry.pages_per_slab
        self._idle_in[place] += 1
        self._num_idle += 1
        self._idle_slabs += self._is_idle(place)

    def set_used(self, page: int) -> None:
        """Mark an idle block as used, because it is read again or about to be freed."""
        place = page // self.geometry.pages_per_slab
        self._idle_slabs -= self._is_idle(place)
        self._idle_in[place] -= 1
        self._num_idle -= 1

    def slab_pages(self, page: int) -> range:
        """Return the page ids of all blocks in the slab of this page."""
        geometry = self.geometry
        first = page // geometry.pages_per_slab * geometry.pages_per_slab
        return range(first, first + geometry.blocks_per_slab * geometry.pages_per_block, geometry.pages_per_block)

    def idle_slab(self, page: int) -> bool:
        """Whether the slab of this page holds only free and idle blocks."""
        return self._is_idle(page // self.geometry.pages_per_slab)

    @property
    def idle_slabs(self) -> int:
        """Slabs that dropping idle blocks would return."""
        return self._idle_slabs

    def _is_idle(self, place: int) -> bool:
        return self._idle_in[place] + len(self._free_in[place]) == self.geometry.blocks_per_slab

    def _borrow(self) -> bool:
        if not self._places:
            return False
        lent = self._pool.lend(self._owner, 1)
        if lent is None:
            return False
        place = self._places.pop()
        geometry = self.geometry
        self._mapper.map_kv(place, lent[0])
        self._slab_at[place] = lent[0]
        first = place * geometry.pages_per_slab
        step = geometry.pages_per_block
        self._free_in[place] = [first + j * step for j in range(geometry.blocks_per_slab - 1, -1, -1)]
        self._idle_in[place] = 0
        self._idle_slabs += 1  # until its first block is taken
        self._by_room[geometry.blocks_per_slab][place] = None
        self._num_free += geometry.blocks_per_slab
        return True

    def _return(self, place: int) -> None:
        self._mapper.unmap_kv(place)
        self._num_free -= len(self._free_in.pop(place))
        del self._idle_in[place]
        self._places.append(place)
        self._pool.release(self._owner, (self._slab_at.pop(place),))

    def check(self) -> None:
        """Raise AssertionError unless every place is in the bucket of its free blocks and the counts add up."""
        per_slab = self.geometry.blocks_per_slab
        for place, free in self._free_in.items():
            if place not in self._by_room[len(free)] or len(set(free)) != len(free):
                raise AssertionError(f"{self._owner}: slab at place {place} is in the wrong bucket or has a page twice")
            if len(free) + self._idle_in[place] > per_slab or self._idle_in[place] < 0 or len(free) == per_slab:
                raise AssertionError(
                    f"{self._owner}: slab at place {place} has {len(free)} free and {self._idle_in[place]} idle of {per_slab}"
                )
        if sum(map(len, self._by_room)) != len(self._slab_at) or self._pool.lent(self._owner) != len(self._slab_at):
            raise AssertionError(
                f"{self._owner}: {len(self._slab_at)} slabs mapped, {self._pool.lent(self._owner)} lent"
            )
        if self._num_free != sum(map(len, self._free_in.values())) or self._num_idle != sum(self._idle_in.values()):
            raise AssertionError(f"{self._owner}: free or idle blocks miscounted")
        if self._idle_slabs != sum(self._is_idle(place) for place in self._free_in):
            raise AssertionError(f"{self._owner}: {self._idle_slabs} idle slabs counted")
