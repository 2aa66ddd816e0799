"""Keeps copies of one model's KV blocks in host memory after their device memory was given away, and finds them by the same digests.

Blocks lie in chunks of host memory as they lie in slabs, so one pool and one index serve both. A copy stays after it was restored: a block is
immutable, so nothing is copied when it leaves the device again.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from runtime.engine.kvcache.prefix import PrefixCache


class KvCopies(Protocol):
    """Takes copies of blocks (page, host page) as operations."""

    def save(self, blocks: Sequence[tuple[int, int]]) -> None: ...

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None: ...


class HostBlocks:
    """Implements prefix.LowerTier.

    Args:
        cache: the index of the copies. All of its blocks are idle between two calls.
        make_room: lets `cache.take` allocate a block for content that was last read at the given time. Returns False if a block that was read later
            would be lost for it.
    """

    def __init__(self, cache: PrefixCache, copies: KvCopies, make_room: Callable[[PrefixCache, float], bool]) -> None:
        self.cache = cache
        self.num_saved = 0
        self.num_restored = 0
        self._copies = copies
        self._make_room = make_room

    @property
    def num_dropped(self) -> int:
        """The number of copies that are lost."""
        return self.num_saved - self.cache.blocks.idle_blocks

    def holds(self, digest: bytes) -> bool:
        return self.cache.match((digest,)) == 1

    def touch(self, digests: Sequence[bytes], now: float) -> None:
        """Note that the leading ones of these blocks that are held will be read soon, so that others are dropped before them."""
        self.cache.release(self.cache.acquire(digests[: self.cache.match(digests)]), now)

    def save(self, blocks: Sequence[tuple[int, bytes, float]]) -> None:
        cache = self.cache
        places = {digest: cache.acquire((digest,))[0] for _, digest, _ in blocks if self.holds(digest)}
        copied: list[tuple[int, int]] = []
        for page, digest, read_s in sorted(blocks):  # adjacent blocks stay adjacent, so that one copy moves several
            if digest in places or not self._make_room(cache, read_s):
                continue
            place = cache.take()
            if place is None:
                break
            cache.publish(place, digest)
            places[digest] = place
            copied.append((page, place))
        if copied:
            self._copies.save(copied)
        self.num_saved += len(copied)
        for _, digest, read_s in blocks:  # in the order of their use
            if digest in places:
                cache.release((places[digest],), read_s)

    def restore(self, blocks: Sequence[tuple[int, bytes]], now: float) -> None:
        places = self.cache.acquire([digest for _, digest in blocks])
        self._copies.restore([(page, place) for (page, _), place in zip(blocks, places, strict=True)])
        self.num_restored += len(blocks)
        self.cache.release(places, now)
