"""What every Store promises, on a real etcd and on disk."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from mesh.errors import StoreError
from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EtcdLocation
from mesh.store.protocol import (
    ABSENT,
    Compare,
    Delete,
    Entry,
    EntryDeleted,
    EntryPut,
    Listing,
    Put,
    Relisted,
    Store,
    WatchEvent,
)
from tests.support.etcd import EtcdServer

prefixes = (f"/contract{number}/" for number in itertools.count())


@pytest.fixture(params=["etcd", "embedded"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    made: Store
    if request.param == "etcd":
        server: EtcdServer = request.getfixturevalue("etcd")
        made = EtcdStore(EtcdLocation((server.endpoint,)))
    else:
        made = EmbeddedStore(tmp_path)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def root() -> str:
    return next(prefixes)


async def take(events: AsyncIterator[WatchEvent], count: int) -> list[WatchEvent]:
    async with asyncio.timeout(10):
        return [await anext(events) for _ in range(count)]


async def test_store_put_get_delete(store: Store, root: str) -> None:
    assert await store.get(root + "a") is None
    first = await store.put(root + "a", b"1")
    second = await store.put(root + "a", b"\x00\xff")
    assert await store.get(root + "a") == Entry(root + "a", b"\x00\xff", first, second, 0)
    assert second > first
    assert await store.delete(root + "a") is True
    assert await store.delete(root + "a") is False
    assert await store.get(root + "a") is None


async def test_store_takes_keys_of_any_text(store: Store, root: str) -> None:
    names = ["größe/模型", "a b", "x\x7f", "zz", "z", "meta-llama/Llama-3.1-8B@main"]
    for name in names:
        await store.put(root + name, name.encode())
    listing = await store.get_prefix(root)
    assert [entry.key for entry in listing.entries] == sorted(root + name for name in names)
    assert all(entry.value == entry.key.removeprefix(root).encode() for entry in listing.entries)


async def test_get_prefix_is_exact_and_consistent(store: Store, root: str) -> None:
    await store.put(root[:-1] + "0neighbour", b"")
    await store.put(root + "a", b"1")
    revision = await store.put(root + "b", b"2")
    assert [entry.key for entry in (await store.get_prefix(root)).entries] == [root + "a", root + "b"]
    assert (await store.get_prefix(root)).revision >= revision
    assert (await store.get_prefix(root + "none/")).entries == ()


async def test_txn_compares_and_sets(store: Store, root: str) -> None:
    key = root + "k"
    created = await store.txn([Compare(key, mod_revision=ABSENT)], [Put(key, b"1")])
    assert created.succeeded
    again = await store.txn([Compare(key, create_revision=ABSENT)], [Put(key, b"2")])
    assert not again.succeeded
    assert again.current == (Entry(key, b"1", created.revision, created.revision),)
    assert (await store.txn([Compare(key, mod_revision=created.revision)], [Put(key, b"3")])).succeeded
    assert not (await store.txn([Compare(key, mod_revision=created.revision)], [Put(key, b"4")])).succeeded
    assert (await store.txn([Compare(key, create_revision=created.revision)], [Delete(key)])).succeeded
    lost = await store.txn([Compare(key, create_revision=created.revision)], [Put(key, b"5")])
    assert lost.current == (None,)


async def test_txn_is_atomic_with_one_revision(store: Store, root: str) -> None:
    a, b, c = root + "a", root + "b", root + "c"
    old = await store.put(a, b"old")
    failed = await store.txn(
        [Compare(a, mod_revision=old), Compare(b, mod_revision=7)], [Put(a, b"new"), Put(c, b"new")]
    )
    assert not failed.succeeded
    assert [entry and entry.key for entry in failed.current] == [a, None]
    assert await store.get(c) is None
    done = await store.txn(
        [Compare(a, mod_revision=old), Compare(b, mod_revision=ABSENT)], [Delete(a), Put(b, b"new"), Put(c, b"new")]
    )
    assert done.succeeded
    listing = await store.get_prefix(root)
    assert [(entry.key, entry.mod_revision) for entry in listing.entries] == [(b, done.revision), (c, done.revision)]


async def test_txn_refuses_two_writes_of_one_key(store: Store, root: str) -> None:
    with pytest.raises(StoreError):
        await store.txn([], [Put(root + "a", b"1"), Put(root + "a", b"2")])
    assert await store.get(root + "a") is None


async def test_txn_of_concurrent_writers_loses_no_update(store: Store, root: str) -> None:
    key = root + "counter"
    await store.put(key, b"0")

    async def add() -> None:
        entry = await store.get(key)
        while True:
            assert entry is not None
            result = await store.txn(
                [Compare(key, mod_revision=entry.mod_revision)], [Put(key, str(int(entry.value) + 1).encode())]
            )
            if result.succeeded:
                return
            entry = result.current[0]

    await asyncio.gather(*(add() for _ in range(20)))
    entry = await store.get(key)
    assert entry is not None
    assert entry.value == b"20"


async def test_watch_begins_with_a_listing_and_follows_in_order(store: Store, root: str) -> None:
    before = await store.put(root + "before", b"0")
    async with aclosing(store.watch(root)) as events:
        (first,) = await take(events, 1)
        assert isinstance(first, Relisted)
        assert not first.went_back
        assert first.listing.entries == (Entry(root + "before", b"0", before, before),)
        await store.put(root[:-1] + "0neighbour", b"")
        put = await store.put(root + "a", b"1")
        both = await store.txn([], [Put(root + "a", b"2"), Delete(root + "before")])
        got = await take(events, 3)
        assert got[0] == EntryPut(Entry(root + "a", b"1", put, put))
        assert set(got[1:]) == {
            EntryPut(Entry(root + "a", b"2", put, both.revision)),
            EntryDeleted(root + "before", both.revision),
        }


async def test_watch_from_a_revision_replays(store: Store, root: str) -> None:
    first = await store.put(root + "a", b"1")
    second = await store.put(root + "a", b"2")
    await store.delete(root + "a")
    async with aclosing(store.watch(root, second)) as events:
        got = await take(events, 2)
    assert got[0] == EntryPut(Entry(root + "a", b"2", first, second))
    assert isinstance(got[1], EntryDeleted)


async def test_watch_from_the_next_revision_waits_for_it(store: Store, root: str) -> None:
    revision = await store.put(root + "a", b"1")
    async with aclosing(store.watch(root, revision + 1)) as events:
        watching = asyncio.create_task(take(events, 1))
        await asyncio.sleep(0.05)
        put = await store.put(root + "b", b"2")
        assert await watching == [EntryPut(Entry(root + "b", b"2", put, put))]


async def test_watch_after_a_listing_misses_nothing(store: Store, root: str) -> None:
    """A writer that never stops: listing plus events after it is the same as everything written."""
    stop = asyncio.Event()
    written = 0

    async def write() -> None:
        nonlocal written
        while not stop.is_set():
            await store.put(f"{root}{written}", b"")
            written += 1
            await asyncio.sleep(0)

    writer = asyncio.create_task(write())
    await asyncio.sleep(0.02)
    listing: Listing = await store.get_prefix(root)
    seen = [entry.key for entry in listing.entries]
    async with aclosing(store.watch(root, listing.revision + 1)) as events:
        await asyncio.sleep(0.05)
        stop.set()
        await writer
        for event in await take(events, written - len(seen)):
            assert isinstance(event, EntryPut)
            seen.append(event.entry.key)
    assert sorted(seen) == sorted(f"{root}{number}" for number in range(written))


async def test_lease_revoked_deletes_its_keys(store: Store, root: str) -> None:
    lease = await store.grant(30)
    other = await store.grant(30)
    await store.put(root + "a", b"", lease=lease)
    await store.put(root + "b", b"", lease=lease)
    await store.put(root + "c", b"", lease=other)
    await store.put(root + "b", b"now without a lease")
    async with aclosing(store.watch(root)) as events:
        await take(events, 1)
        await store.revoke(lease)
        (gone,) = await take(events, 1)
        assert isinstance(gone, EntryDeleted)
        assert gone.key == root + "a"
    assert [entry.key for entry in (await store.get_prefix(root)).entries] == [root + "b", root + "c"]
    await store.revoke(lease)
    with pytest.raises(StoreError):
        await store.put(root + "d", b"", lease=lease)
    assert not other.lost.is_set()


async def test_close_ends_watches_and_refuses_calls(store: Store, root: str) -> None:
    events = store.watch(root)
    await take(events, 1)
    rest = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0.05)
    await store.close()
    assert await asyncio.wait_for(rest, 10) is None
    with pytest.raises(StoreError):
        await store.get(root + "a")
    with pytest.raises(StoreError):
        await store.put(root + "a", b"")
    await store.close()
