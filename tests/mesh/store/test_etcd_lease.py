"""Leases of etcd and the keys under them: what expires, what survives a restart, what is set again."""

import asyncio
from contextlib import aclosing

import pytest

from mesh.errors import StoreError
from mesh.store.leased_key import LeasedKey
from mesh.store.protocol import ABSENT, Compare, EntryDeleted, EntryPut, Put, Relisted
from tests.support.etcd import EtcdServer
from tests.support.etcd_stores import opened, take


async def test_lease_expires_only_without_its_keeper(etcd: EtcdServer, root: str) -> None:
    async with opened(etcd.endpoint) as watcher, aclosing(watcher.watch(root)) as events:
        await take(events, 1)
        async with opened(etcd.endpoint) as holder, opened(etcd.endpoint) as dying:
            held, dropped = await holder.grant(2), await dying.grant(2)
            assert held.ttl_s >= 2
            await holder.put(root + "held", b"", lease=held)
            await dying.put(root + "dropped", b"", lease=dropped)
            await take(events, 2)
            await dying.close()
            (gone,) = await take(events, 1)
            assert gone == EntryDeleted(root + "dropped", gone.mod_revision)  # type: ignore[union-attr]
            assert await watcher.get(root + "held") is not None
            assert not held.lost.is_set()


async def test_leased_key_is_put_again_after_a_lost_lease(etcd: EtcdServer, root: str) -> None:
    async with opened(etcd.endpoint) as store, opened(etcd.endpoint) as other:
        key = LeasedKey(store, root + "pod", ttl_s=2)
        await key.set(b"1")
        lease = key.lease
        assert lease is not None
        async with aclosing(other.watch(root)) as events:
            await take(events, 1)
            await other.revoke(lease)
            gone, back = await take(events, 2)
            assert isinstance(gone, EntryDeleted)
            assert isinstance(back, EntryPut)
            assert back.entry.value == b"1"
            assert back.entry.lease_id not in (0, lease.id)
            assert lease.lost.is_set()
            await key.remove()
            assert isinstance((await take(events, 1))[0], EntryDeleted)


async def test_lease_is_lost_with_the_first_write_that_etcd_refuses(etcd: EtcdServer, root: str) -> None:
    """The next renewal would come after 15 s."""
    async with opened(etcd.endpoint) as store, opened(etcd.endpoint) as other:
        leases = [await store.grant(60) for _ in range(3)]
        for lease in leases[:2]:
            await other.revoke(lease)
        with pytest.raises(StoreError, match="lease not found"):
            await store.put(root + "a", b"1", lease=leases[0])
        with pytest.raises(StoreError, match="lease not found"):
            await store.txn([Compare(root + "b", mod_revision=ABSENT)], [Put(root + "b", b"1", leases[1].id)])
        assert [lease.lost.is_set() for lease in leases] == [True, True, False]


async def test_leased_key_is_set_again_after_etcd_lost_its_lease(etcd: EtcdServer, root: str) -> None:
    async with opened(etcd.endpoint) as store, opened(etcd.endpoint) as other:
        key = LeasedKey(store, root + "pod", ttl_s=60)
        await key.set(b"1")
        assert key.lease is not None
        await other.revoke(key.lease)
        with pytest.raises(StoreError):
            await key.set(b"2")
        was_held = key.is_held
        await key.set(b"3")
        assert (was_held, key.is_held) == (False, True)
        await key.remove()


async def test_lease_survives_a_restart_of_etcd(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint) as store:
        key = LeasedKey(store, "/i/pod", ttl_s=2)
        await key.set(b"1")
        own_etcd.kill()
        own_etcd.start()
        async with opened(own_etcd.endpoint) as other:
            entry = await other.get("/i/pod")
            assert entry is not None
            await asyncio.sleep(3.0)
            assert await other.get("/i/pod") is not None
        await key.remove()


async def test_leased_key_set_without_etcd_appears_when_it_is_back(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint, call_timeout_s=0.5) as store:
        key = LeasedKey(store, "/i/pod", ttl_s=5)
        own_etcd.kill()
        with pytest.raises(StoreError):
            await key.set(b"1")
        own_etcd.start()
        async with opened(own_etcd.endpoint) as other, aclosing(other.watch("/i/")) as events:
            (listed,) = await take(events, 1)
            assert isinstance(listed, Relisted)
            if not listed.listing.entries:
                await take(events, 1)
            entry = await other.get("/i/pod")
            assert entry is not None
            assert entry.value == b"1"
        await key.remove()
