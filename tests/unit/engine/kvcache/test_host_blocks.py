"""Blocks in host memory: what comes back is what left, within one budget, and the least recently read blocks are dropped first."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.core.host_kv import HostKv
from runtime.engine.interfaces import KvGeometry
from runtime.engine.kvcache.blocks import BlockPool
from runtime.engine.kvcache.host_blocks import HostBlocks
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import MapHostKv, Operation, RestoreKv, SaveKv, UnmapHostKv

GEOMETRIES = {"a": KvGeometry(4, 3, 17, 5, 64, 64), "b": KvGeometry(4, 2, 2, 1, 64, 64)}


class Mapper:
    def map_kv(self, index: int, slab: int) -> None: ...

    def unmap_kv(self, index: int) -> None: ...


class Memories:
    """The content of every page of two models that share a device and a host budget, changed by operations alone."""

    def __init__(self, slabs: int, chunks: int) -> None:
        self.operations: list[Operation] = []
        self.has_room = True
        self.chunks = chunks
        self.host_kv = HostKv(chunks, lambda: self.has_room, self.operations.append)
        self.slabs = SlabPool(slabs)
        self.hosts: dict[str, HostBlocks] = {}
        self.caches: dict[str, PrefixCache] = {}
        for name, geometry in GEOMETRIES.items():
            host = self.host_kv.open(name, geometry)
            assert host is not None
            self.hosts[name] = host
            self.caches[name] = PrefixCache(BlockPool(geometry, self.slabs, name, Mapper()), host)
        self.device: dict[tuple[str, int], bytes] = {}
        self.host: dict[tuple[str, int], bytes] = {}
        self.mapped: set[tuple[str, int]] = set()

    def apply(self) -> list[Operation]:
        """Apply what was enqueued."""
        done, self.operations[:] = list(self.operations), []
        for operation in done:
            match operation:
                case MapHostKv(name, index):
                    assert (name, index) not in self.mapped
                    self.mapped.add((name, index))
                case UnmapHostKv(name, index):
                    self.mapped.remove((name, index))
                case SaveKv(name, blocks):
                    for page, place in blocks:
                        assert (name, place // GEOMETRIES[name].pages_per_slab) in self.mapped
                        self.host[name, place] = self.device[name, page]
                case RestoreKv(name, blocks):
                    for page, place in blocks:
                        assert (name, place // GEOMETRIES[name].pages_per_slab) in self.mapped
                        self.device[name, page] = self.host[name, place]
            assert len(self.mapped) <= self.chunks
        return done

    def compute(self, name: str, digest: bytes, now: float) -> bool:
        """Fill a block, as a sequence does that ends at once."""
        page = self.caches[name].take()
        if page is None:
            return False
        self.device[name, page] = digest
        self.caches[name].publish(page, digest)
        self.caches[name].release([page], now)
        return True

    def evict(self, name: str) -> None:
        while self.caches[name].drop_oldest_slab():
            pass


@given(st.integers(2, 6), st.integers(1, 5), st.randoms(use_true_random=False), st.integers(0, 120))
def test_blocks_come_back_as_they_left(slabs: int, chunks: int, rng: random.Random, steps: int) -> None:
    memories = Memories(slabs, chunks)
    digests = [bytes([number]) for number in range(14)]
    for now in range(steps):
        name = rng.choice(("a", "b"))
        cache, host = memories.caches[name], memories.hosts[name]
        kind = rng.random()
        memories.has_room = rng.random() < 0.8
        if kind < 0.4:
            digest = rng.choice(digests)
            if not cache.match([digest]):
                memories.compute(name, digest, now)
        elif kind < 0.6:
            wanted = rng.sample(digests, rng.randint(1, 5))
            found = cache.match(wanted)
            pages = cache.acquire(wanted[:found])
            fetchable, to_copy = cache.fetchable(wanted[found:])
            restored = host.num_restored
            pages += cache.fetch(wanted[found:], now)
            memories.apply()
            assert len(pages) - found <= fetchable
            if len(pages) - found == fetchable:
                assert host.num_restored - restored == to_copy
            assert [memories.device[name, page] for page in pages] == wanted[: len(pages)]
            # what stopped the search is neither here nor there, or has no room
            rest = wanted[len(pages) :]
            assert not rest or (not cache.match(rest) and (not host.holds(rest[0]) or not cache.obtainable()))
            cache.release(pages, now)
        elif kind < 0.85:
            cache.drop_oldest_slab()
        elif kind < 0.92:
            before = memories.host_kv.num_chunks
            assert memories.host_kv.drop_oldest() == (before > 0)
            assert memories.host_kv.num_chunks == max(before - 1, 0)
        else:
            cache.forget()
            memories.host_kv.forget(name)
        memories.apply()
        cache.check()
        memories.host_kv.check()
        assert len(memories.mapped) == memories.host_kv.num_chunks
        assert 0 <= host.num_dropped <= host.num_saved
        assert host.num_saved - host.num_dropped == sum(host.holds(digest) for digest in digests)
    for name in GEOMETRIES:
        memories.host_kv.close(name)
    memories.apply()
    assert not memories.mapped


@pytest.fixture
def memories() -> Memories:
    return Memories(slabs=6, chunks=2)


def test_host_blocks_copy_a_block_out_once(memories: Memories) -> None:
    for number in range(3):
        assert memories.compute("a", bytes([number]), 1.0)
    memories.evict("a")
    assert sum(isinstance(operation, SaveKv) for operation in memories.apply()) == 1
    pages = memories.caches["a"].fetch([b"\0", b"\1", b"\2"], 2.0)
    assert len(pages) == 3
    memories.caches["a"].release(pages, 2.0)
    memories.evict("a")
    assert not any(isinstance(operation, SaveKv) for operation in memories.apply())
    assert (memories.hosts["a"].num_saved, memories.hosts["a"].num_restored) == (3, 3)


def test_neighbours_stay_neighbours(memories: Memories) -> None:
    for number in range(3):
        assert memories.compute("a", bytes([number]), 1.0)
    memories.evict("a")
    (save,) = (operation for operation in memories.apply() if isinstance(operation, SaveKv))
    assert save.blocks == ((0, 0), (5, 5), (10, 10))


def test_host_blocks_keep_the_beginning_of_a_prefix_longest() -> None:
    """Three blocks find room for eight: of a sequence that leaves, those are kept that more prefixes begin with."""
    memories = Memories(slabs=6, chunks=1)
    cache, host = memories.caches["a"], memories.hosts["a"]
    digests = [bytes([number]) for number in range(8)]
    pages = [cache.take() for _ in digests]
    for page, digest in zip(pages, digests, strict=True):
        assert page is not None
        memories.device["a", page] = digest
        cache.publish(page, digest)
    cache.release([page for page in pages if page is not None], 1.0)
    memories.evict("a")
    memories.apply()
    assert [host.holds(digest) for digest in digests] == [True] * 3 + [False] * 5
    assert len(cache.fetch(digests, 2.0)) == 3
    memories.apply()


def test_host_blocks_evict_the_model_that_was_read_longest_ago() -> None:
    memories = Memories(slabs=6, chunks=1)
    memories.compute("a", b"a", 1.0)
    memories.evict("a")
    memories.compute("b", b"b", 2.0)
    memories.evict("b")
    assert not memories.hosts["a"].holds(b"a")
    assert memories.hosts["b"].holds(b"b")
    memories.compute("a", b"old", 1.5)
    memories.evict("a")
    assert not memories.hosts["a"].holds(b"old"), "it is older than what it would displace"
    assert memories.hosts["b"].holds(b"b")


def test_host_blocks_save_nothing_without_host_memory() -> None:
    memories = Memories(slabs=6, chunks=2)
    memories.has_room = False
    memories.compute("a", b"a", 1.0)
    memories.evict("a")
    assert not memories.apply()
    assert HostKv(0, lambda: True, memories.operations.append).open("c", GEOMETRIES["a"]) is None
