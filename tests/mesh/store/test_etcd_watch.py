"""Watches of etcd: what a kill, a compaction, a restore and a server that hangs leave of a watch."""

import asyncio
from contextlib import aclosing

import pytest

from mesh.store import etcd_watch
from mesh.store.etcd_connection import Method
from mesh.store.protocol import EntryPut, Relisted
from tests.support.etcd import EtcdServer
from tests.support.etcd_stores import connected, opened, take
from wire import etcd_pb2 as pb

COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionResponse.FromString, repeatable=True)


async def compact(endpoint: str, revision: int) -> None:
    async with connected(endpoint) as connection:
        await connection.call(COMPACT, pb.CompactionRequest(revision=revision, physical=True))


async def test_watch_survives_a_kill_and_misses_nothing(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint) as store, aclosing(store.watch("/a/")) as events:
        await take(events, 1)
        await store.put("/a/before", b"")
        await take(events, 1)
        own_etcd.kill()
        elsewhere = own_etcd.start(elsewhere=True)
        async with opened(elsewhere) as other:
            await other.put("/a/gap", b"1")
            await other.delete("/a/before")
            await other.put("/a/gap", b"2")
        own_etcd.kill()
        own_etcd.start()
        got = await take(events, 3)
        assert [event.entry.value if isinstance(event, EntryPut) else None for event in got] == [b"1", None, b"2"]
        await store.put("/a/after", b"")
        assert isinstance((await take(events, 1))[0], EntryPut)


async def test_watch_catching_up_over_batches_misses_nothing(own_etcd: EtcdServer) -> None:
    """etcd sends at most a thousand revisions an answer, with the store's current revision in each answer's header."""
    async with opened(own_etcd.endpoint) as store:
        first = await store.put("/n/start", b"")
        written = 2500
        for start in range(0, written, 100):
            await asyncio.gather(*(store.put(f"/n/{number}", b"") for number in range(start, start + 100)))
        seen: set[str] = set()
        async with aclosing(store.watch("/n/", first + 1)) as events:
            for number, event in enumerate(await take(events, 1500)):
                assert isinstance(event, EntryPut), number
                seen.add(event.entry.key)
            own_etcd.kill()
            own_etcd.start()
            for event in await take(events, written - 1500):
                assert isinstance(event, EntryPut)
                seen.add(event.entry.key)
        assert len(seen) == written


async def test_watch_relists_after_a_compaction_in_its_gap(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint) as store, aclosing(store.watch("/a/")) as events:
        await take(events, 1)
        await store.put("/a/old", b"")
        await take(events, 1)
        own_etcd.kill()
        elsewhere = own_etcd.start(elsewhere=True)
        async with opened(elsewhere) as other:
            await other.delete("/a/old")
            revision = await other.put("/a/new", b"")
            await compact(elsewhere, revision)
        own_etcd.kill()
        own_etcd.start()
        (listed,) = await take(events, 1)
        assert isinstance(listed, Relisted)
        assert [entry.key for entry in listed.listing.entries] == ["/a/new"]
        assert not listed.went_back
        await store.put("/a/after", b"")
        assert isinstance((await take(events, 1))[0], EntryPut)


async def test_watch_from_a_compacted_revision_relists(etcd: EtcdServer, root: str) -> None:
    async with opened(etcd.endpoint) as store:
        first = await store.put(root + "a", b"1")
        await store.put(root + "a", b"2")
        last = await store.put(root + "a", b"3")
        await compact(etcd.endpoint, last)
        async with aclosing(store.watch(root, first)) as events:
            (listed,) = await take(events, 1)
            assert isinstance(listed, Relisted)
            assert [entry.value for entry in listed.listing.entries] == [b"3"]
            await store.put(root + "a", b"4")
            (put,) = await take(events, 1)
            assert isinstance(put, EntryPut)
            assert put.entry.value == b"4"


async def test_watch_notices_a_store_that_lost_its_data(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint) as store, aclosing(store.watch("/a/")) as events:
        await take(events, 1)
        for number in range(5):
            await store.put(f"/a/{number}", b"")
        await take(events, 5)
        own_etcd.wipe()
        own_etcd.start()
        (listed,) = await take(events, 1)
        assert isinstance(listed, Relisted)
        assert listed.went_back
        assert listed.listing.entries == ()


async def test_watch_lists_a_restored_store_instead_of_repeating_its_history(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint) as store, aclosing(store.watch("/a/")) as events:
        await take(events, 1)
        for number in range(8):
            await store.put("/a/x", str(number).encode())
        await take(events, 8)
        own_etcd.wipe()
        own_etcd.start()
        (emptied,) = await take(events, 1)
        assert isinstance(emptied, Relisted)
        await store.put("/a/y", b"")
        await take(events, 1)
        own_etcd.restore()
        own_etcd.start()
        (restored,) = await take(events, 1)
        assert isinstance(restored, Relisted)
        assert [entry.value for entry in restored.listing.entries] == [b"7"]
        assert not restored.went_back
        await store.put("/a/x", b"8")
        (put,) = await take(events, 1)
        assert isinstance(put, EntryPut)
        assert put.entry.value == b"8"


async def test_watch_restarts_when_the_server_hangs(
    own_etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(etcd_watch, "PROGRESS_INTERVAL_S", 0.1)
    monkeypatch.setattr(etcd_watch, "SILENCE_TIMEOUT_S", 0.5)
    async with opened(own_etcd.endpoint) as store, aclosing(store.watch("/a/")) as events:
        await take(events, 1)
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(1.0)
        assert "stream was cancelled" not in caplog.text, "the watch answers requests for progress"
        own_etcd.pause()
        async with asyncio.timeout(20):
            while "stream was cancelled" not in caplog.text:
                await asyncio.sleep(0.05)
        own_etcd.resume()
        await store.put("/a/x", b"1")
        async with asyncio.timeout(20):
            assert isinstance(await following, EntryPut)


async def test_watch_begun_without_etcd_begins_when_it_is_back(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint, call_timeout_s=0.5) as store:
        await store.put("/a/x", b"")
        own_etcd.kill()
        async with aclosing(store.watch("/a/")) as events:
            first = asyncio.ensure_future(anext(events))
            await asyncio.sleep(1.0)
            assert not first.done()
            own_etcd.start()
            async with asyncio.timeout(20):
                listed = await first
            assert isinstance(listed, Relisted)
            assert [entry.key for entry in listed.listing.entries] == ["/a/x"]
