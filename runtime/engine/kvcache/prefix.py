"""Prefix cache of one model: a full KV block is found by the hash of all tokens up to its end and shared by every sequence with that beginning.

Blocks are reference-counted. A block without references stays idle until its memory is needed, least recently used first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from runtime.engine.kvcache.blocks import BlockPool

_ROOT = b""


def chain(tokens: Sequence[int], block_tokens: int, digests: list[bytes], num_blocks: int, root: bytes = _ROOT) -> None:
    """Extend `digests` to `num_blocks` hashes. With 128 bits, collisions are not expected in any machine's lifetime.

    `root`: what beside the tokens decides the KV, such as an adapter.
    """
    parent = digests[-1] if digests else root
    for i in range(len(digests), num_blocks):
        content = array("i", tokens[i * block_tokens : (i + 1) * block_tokens]).tobytes()
        parent = blake2b(parent + content, digest_size=16).digest()
        digests.append(parent)


class LowerTier(Protocol):
    """Keeps copies of blocks whose device memory is given to another owner."""

    def holds(self, digest: bytes) -> bool:
        """Whether there is a copy of this block."""

    def save(self, blocks: Sequence[tuple[int, bytes, float]]) -> None:
        """Copy blocks (page, digest, when it was last read), as far as there is room, before their memory is released."""

    def restore(self, blocks: Sequence[tuple[int, bytes]], now: float) -> None:
        """Copy held blocks (page, digest) into these pages."""


class PrefixCache:
    """Reference-counted blocks with an index by content. `lower`: None = blocks that leave are lost."""

    def __init__(self, blocks: BlockPool, lower: LowerTier | None = None) -> None:
        self.blocks = blocks
        self._lower = lower
        self._references: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        # page → when it was last read; oldest first (a plain dict finds its first slowly once many before it were deleted)
        self._idle: OrderedDict[int, float] = OrderedDict()

    @property
    def oldest_idle_s(self) -> float | None:
        """When the least recently used idle block was last read."""
        return next(iter(self._idle.values()), None)

    def obtainable(self) -> int:
        """Return how many blocks `take` could allocate, idle ones included."""
        return self.blocks.obtainable() + len(self._idle)

    def take(self) -> int | None:
        """Allocate a block for new content: a free one, else the least recently used idle one. Returns None if there is neither."""
        page = self.blocks.take()
        if page is None:
            if not self._idle:
                return None
            page = next(iter(self._idle))
            self._forget_idle(page)
        self._references[page] = 1
        return page

    def match(self, digests: Sequence[bytes]) -> int:
        """Return how many of these blocks, counted from the first, are cached."""
        page_of = self._page_of
        for i, digest in enumerate(digests):
            if digest not in page_of:
                return i
        return len(digests)

    def idle_among(self, digests: Sequence[bytes]) -> int:
        """Return how many of these matched blocks are idle. Acquiring those reduces `obtainable`."""
        return sum(self._page_of[digest] in self._idle for digest in digests)

    def acquire(self, digests: Sequence[bytes]) -> list[int]:
        """Add a reference to each of these matched blocks. Returns their pages."""
        pages = [self._page_of[digest] for digest in digests]
        for page in pages:
            if page in self._idle:
                del self._idle[page]
                self.blocks.set_used(page)
                self._references[page] = 1
            else:
                self._references[page] += 1
        return pages

    def fetchable(self, digests: Sequence[bytes]) -> tuple[int, int]:
        """Return how many of these blocks, counted from the first, are cached or held by the lower tier, and how many of them must be copied in."""
        lower = self._lower
        if lower is None:
            return 0, 0
        found = copied = 0
        for digest in digests:
            if digest not in self._page_of:
                if not lower.holds(digest):
                    break
                copied += 1
            found += 1
        return found, copied

    def fetch(self, digests: Sequence[bytes], now: float) -> list[int]:
        """Allocate the leading ones of these blocks that the lower tier holds, as far as there is room, and have them copied in.

        Returns their pages with one reference each.
        """
        lower = self._lower
        if lower is None:
            return []
        pages: list[int] = []
        restored: list[tuple[int, bytes]] = []
        for digest in digests:
            if digest in self._page_of:  # blocks of one prefix may leave the device in any order
                pages += self.acquire((digest,))
                continue
            page = self.take() if lower.holds(digest) else None
            if page is None:
                break
            self.publish(page, digest)
            pages.append(page)
            restored.append((page, digest))
        if restored:
            lower.restore(restored, now)
        return pages

    def publish(self, page: int, digest: bytes) -> None:
        """Add a block to the index. Of two blocks with equal content, the first one stays in the index."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int], now: float) -> None:
        """Drop one reference of each page. The last pages become the least recently used, since the first ones serve more prefixes."""
        for page in reversed(pages):
            left = self._references[page] - 1
            if left:
                self._references[page] = left
                continue
            del self._references[page]
            if page in self._digest_of:
                self._idle[page] = now
                self.blocks.set_idle(page)
            else:
                self.blocks.free(page)

    def drop_oldest_slab(self) -> bool:
        """Release the least recently used slab without used blocks, whose content the lower tier may keep. Returns whether there was one."""
        for page in self._idle:
            if self.blocks.idle_slab(page):
                leaving = [p for p in self.blocks.slab_pages(page) if p in self._idle]
                if self._lower is not None:
                    # In the order of their use; of one sequence the last blocks, which serve fewer prefixes, come first.
                    leaving.sort(key=lambda p: (self._idle[p], -p))
                    self._lower.save([(p, self._digest_of[p], self._idle[p]) for p in leaving])
                for other in leaving:
                    self._forget_idle(other)
                    self.blocks.free(other)
                return True
        return False

    def forget(self) -> None:
        """Drop the index and all idle blocks, because a failed step left their content undefined. Running sequences keep their blocks."""
        for page in list(self._idle):
            self._forget_idle(page)
            self.blocks.free(page)
        self._page_of.clear()
        self._digest_of.clear()

    def _forget_idle(self, page: int) -> None:
        del self._idle[page]
        self.blocks.set_used(page)
        del self._page_of[self._digest_of.pop(page)]

    def check(self) -> None:
        self.blocks.check()
        if len(self._references) != self.blocks.used_blocks or len(self._idle) != self.blocks.idle_blocks:
            raise AssertionError(
                f"{len(self._references)} referenced, {self.blocks.used_blocks} used; {len(self._idle)} idle, {self.blocks.idle_blocks}"
            )
        if not self._references.keys().isdisjoint(self._idle) or any(count < 1 for count in self._references.values()):
            raise AssertionError("a block is both idle and referenced, or has no reference")
        if any(self._page_of[digest] != page for page, digest in self._digest_of.items()) or len(self._page_of) != len(
            self._digest_of
        ):
            raise AssertionError("the index of contents disagrees with itself")
