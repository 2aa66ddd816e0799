"""One model's blocks: pages are mapped and never handed out twice, slabs go back, and content is found by all that precedes it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.interfaces import KvGeometry
from runtime.engine.kvcache.blocks import BlockPool
from runtime.engine.kvcache.prefix import PrefixCache, chain
from runtime.engine.memory.slab_pool import SlabPool


class Mapper:
    def __init__(self) -> None:
        self.slab_at: dict[int, int] = {}

    def map_kv(self, index: int, slab: int) -> None:
        assert index not in self.slab_at
        assert slab not in self.slab_at.values()
        self.slab_at[index] = slab

    def unmap_kv(self, index: int) -> None:
        del self.slab_at[index]


def make(total_slabs: int, *, per_slab: int = 3, max_slabs: int = 64) -> tuple[PrefixCache, SlabPool, Mapper]:
    pool, mapper = SlabPool(total_slabs), Mapper()
    geometry = KvGeometry(4, per_slab, per_slab * 5 + 2, 5, 64, max_slabs)
    return PrefixCache(BlockPool(geometry, pool, "m/kv", mapper)), pool, mapper


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5), st.randoms(use_true_random=False), st.integers(0, 150))
def test_blocks_are_never_shared_unasked_and_all_come_back(
    total: int, per_slab: int, most: int, rng: random.Random, steps: int
) -> None:
    cache, pool, mapper = make(total, per_slab=per_slab, max_slabs=most)
    geometry = cache.blocks.geometry
    rows: list[list[int]] = []  # pages that each "row" holds
    digests = [bytes([i]) for i in range(12)]
    known: dict[bytes, int] = {}
    now = 0.0
    for _ in range(steps):
        now += 1
        kind = rng.random()
        if kind < 0.45:
            could = cache.obtainable()
            page = cache.take()
            assert (page is None) == (could == 0)
            if page is not None:
                assert page // geometry.pages_per_slab in mapper.slab_at
                assert (page % geometry.pages_per_slab) % geometry.pages_per_block == 0
                assert page % geometry.pages_per_slab < geometry.blocks_per_slab * geometry.pages_per_block
                assert not any(page in row for row in rows)
                known = {d: p for d, p in known.items() if p != page}
                rows.append([page])
        elif kind < 0.6 and rows:
            page, digest = rng.choice(rng.choice(rows)), rng.choice(digests)
            cache.publish(page, digest)
            if digest not in known and page not in known.values():
                known[digest] = page
        elif kind < 0.7:
            wanted = rng.sample(digests, 2)
            found = wanted[: cache.match(wanted)]
            pages = cache.acquire(found)
            assert pages == [known[d] for d in found]
            if pages:
                rows.append(pages)
        elif kind < 0.9 and rows:
            row = rows.pop(rng.randrange(len(rows)))
            cache.release(row, now)
        elif kind < 0.95:
            before = cache.blocks.slabs
            possible = cache.blocks.idle_slabs
            dropped = cache.drop_oldest_slab()
            assert dropped == (possible > 0)
            assert cache.blocks.slabs == before - dropped
        elif rng.random() < 0.2:
            cache.forget()
            known = {}
        # what was evicted silently cannot be found any more
        known = {d: p for d, p in known.items() if cache.match([d])}
        cache.check()
        pool.check()
        assert pool.lent("m/kv") == len(set(mapper.slab_at.values()))
        held = {page for row in rows for page in row}
        assert cache.blocks.used_blocks == len(held)
        for slab_place in mapper.slab_at:
            in_slab = [p for p in held | set(known.values()) if p // geometry.pages_per_slab == slab_place]
            assert in_slab, "an empty slab was kept"
    for row in rows:
        cache.release(row, now)
    cache.forget()
    assert pool.free == total
    assert not mapper.slab_at


def test_blocks_fill_the_densest_slab_first() -> None:
    cache, _, _ = make(3, per_slab=4)
    pages = [cache.take() for _ in range(12)]
    per_slab = cache.blocks.geometry.pages_per_slab
    slabs = [[p for p in pages if p is not None and p // per_slab == i] for i in range(3)]
    cache.release(slabs[0][:3], 0.0)  # one block left in use
    cache.release(slabs[1][:1], 0.0)  # three left
    assert cache.take() == slabs[1][0]
    taken = cache.take()
    assert taken is not None
    assert taken // per_slab == 0
    assert cache.blocks.free_blocks == 2


def test_blocks_read_last_are_dropped_last() -> None:
    cache, _, _ = make(1, per_slab=4)
    pages = [cache.take() for _ in range(4)]
    digests = [bytes([i]) for i in range(4)]
    for page, digest in zip(pages, digests, strict=True):
        assert page is not None
        cache.publish(page, digest)
        cache.release([page], 1.0)
    cache.release(cache.acquire(digests[:1]), 2.0)  # the oldest is read again
    cache.take()
    assert [cache.match([d]) for d in digests] == [1, 0, 1, 1]


@given(st.lists(st.integers(0, 3), max_size=24), st.lists(st.integers(0, 3), max_size=24))
def test_equal_digests_mean_equal_beginnings(left: list[int], right: list[int]) -> None:
    chains: list[list[bytes]] = [[], []]
    for tokens, digests in zip((left, right), chains, strict=True):
        chain(tokens, 4, digests, len(tokens) // 4)
    for i, (a, b) in enumerate(zip(*chains, strict=False)):
        assert (a == b) == (left[: 4 * (i + 1)] == right[: 4 * (i + 1)])
