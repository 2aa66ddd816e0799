"""What only etcd can do to us: die and return, forget its past, expire leases, be several, ask for a password."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from mesh.errors import StoreError, StoreUncertain
from mesh.store import etcd_watch
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_connection import EtcdConnection, Method
from mesh.store.etcd_lease import KEEP_ALIVE
from mesh.store.factory import store_at
from mesh.store.leased_key import LeasedKey
from mesh.store.location import EtcdLocation, parse_store
from mesh.store.protocol import ABSENT, Compare, Delete, EntryDeleted, EntryPut, Put, Relisted, WatchEvent
from tests.support.etcd import EtcdServer, free_port
from tests.support.waiting import until_async
from wire import etcd_pb2 as pb

roots = (f"/etcd{number}/" for number in itertools.count())

COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionResponse.FromString, repeatable=True)


@pytest.fixture
def root() -> str:
    return next(roots)


@asynccontextmanager
async def opened(
    *endpoints: str, connect_timeout_s: float = 20.0, call_timeout_s: float = 3.5
) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(EtcdLocation(endpoints), connect_timeout_s=connect_timeout_s, call_timeout_s=call_timeout_s)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def take(events: AsyncIterator[WatchEvent], count: int) -> list[WatchEvent]:
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(count)]


@asynccontextmanager
async def connected(endpoint: str) -> AsyncIterator[EtcdConnection]:
    connection = EtcdConnection(EtcdLocation((endpoint,)), connect_timeout_s=20.0, call_timeout_s=3.5)
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


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


async def test_get_prefix_lists_what_does_not_fit_one_answer(etcd: EtcdServer, root: str) -> None:
    store = EtcdStore(EtcdLocation((etcd.endpoint,)))
    await store.open()
    keys = [f"{root}{number:05}" for number in range(5_003)]
    for first in range(0, len(keys), 100):
        await store.txn([], [Put(key, b"1") for key in keys[first : first + 100]])
    listing = await store.get_prefix(root)
    assert [entry.key for entry in listing.entries] == keys
    assert listing.revision == listing.entries[-1].mod_revision
    await store.close()


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


async def test_calls_without_etcd_fail_and_work_again_after(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint, call_timeout_s=0.5) as store:
        own_etcd.kill()
        with pytest.raises(StoreError, match="could be reached within"):
            await store.get("/a")
        with pytest.raises(StoreError) as refused:
            await store.put("/a", b"")
        assert not isinstance(refused.value, StoreUncertain), "nothing was sent, so nothing can have happened"
        own_etcd.start()
        async with asyncio.timeout(20):
            while True:
                try:
                    await store.put("/a", b"1")
                    break
                except StoreError:
                    await asyncio.sleep(0.05)
        assert (await store.get("/a")) is not None


async def test_write_whose_answer_is_lost_is_uncertain(own_etcd: EtcdServer) -> None:
    async with opened(own_etcd.endpoint, call_timeout_s=0.7) as store:
        await store.put("/a", b"1")
        own_etcd.pause()
        writes = [
            store.put("/a", b"2"),
            store.delete("/b"),
            store.txn([Compare("/a", mod_revision=1)], [Put("/c", b"")]),
        ]
        for outcome in await asyncio.gather(*writes, return_exceptions=True):
            assert isinstance(outcome, StoreUncertain)
        with pytest.raises(StoreError) as refused:
            await store.get("/a")
        assert not isinstance(refused.value, StoreUncertain)
        own_etcd.resume()


async def test_open_without_etcd_fails_within_the_connect_timeout() -> None:
    store = EtcdStore(EtcdLocation((f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")), connect_timeout_s=0.5)
    with pytest.raises(
        StoreError, match=r"no etcd endpoint of 127\.0\.0\.1:\d+, 127\.0\.0\.1:\d+ could be reached within 0\.5 s"
    ):
        await store.open()
    await store.close()


async def test_connection_skips_a_dead_endpoint(etcd: EtcdServer, root: str) -> None:
    async with opened(f"127.0.0.1:{free_port()}", etcd.endpoint) as store:
        await store.put(root + "a", b"")
        async with aclosing(store.watch(root)) as events:
            await take(events, 1)


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


async def test_stream_that_ended_is_a_store_error(own_etcd: EtcdServer) -> None:
    """gRPC raises InvalidStateError, UsageError or AioRpcError; a keeper that only expects one of them dies of another."""
    async with connected(own_etcd.endpoint) as connection:
        message = pb.LeaseKeepAliveRequest(ID=1)
        cancelled = await connection.stream(KEEP_ALIVE)
        cancelled.cancel()
        killed = await connection.stream(KEEP_ALIVE)
        await connection.write(killed, message)
        await connection.read(killed)
        own_etcd.kill()
        with pytest.raises(StoreError):
            await connection.read(killed)
        for stream in (cancelled, killed):
            with pytest.raises(StoreError):
                await connection.write(stream, message)


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


class AuthAdmin:
    """Switches etcd's authentication on by hand: field 1 and 2 of these requests are name and password, name and role."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint)

    async def call(self, path: str, *fields: str) -> None:
        request = pb.AuthenticateRequest(
            name=fields[0] if fields else "", password=fields[1] if len(fields) > 1 else ""
        )
        rpc: grpc.aio.UnaryUnaryMultiCallable[pb.AuthenticateRequest, bytes] = self._channel.unary_unary(
            f"/etcdserverpb.Auth/{path}", request_serializer=pb.AuthenticateRequest.SerializeToString
        )
        await rpc(request)

    async def enable(self) -> None:
        await self.call("UserAdd", "root", "secret")
        await self.call("RoleAdd", "root")
        await self.call("UserGrantRole", "root", "root")
        await self.call("AuthEnable")
        await self._channel.close()


async def test_connection_authenticates_again_after_a_restart(own_etcd: EtcdServer) -> None:
    known = EtcdLocation((own_etcd.endpoint,), user="root", password="secret")
    before = EtcdStore(known)
    await before.open()
    await before.put("/a/x", b"0")
    await before.close()
    await AuthAdmin(own_etcd.endpoint).enable()
    store = EtcdStore(known)
    await store.open()
    async with aclosing(store.watch("/a/")) as events:
        await take(events, 1)
        await store.put("/a/x", b"1")
        lease = await store.grant(5)
        await store.put("/a/leased", b"1", lease=lease)
        await take(events, 2)
        own_etcd.kill()
        own_etcd.start()
        await store.put("/a/x", b"2")
        async with asyncio.timeout(20):
            while True:
                (event,) = await take(events, 1)
                if isinstance(event, EntryPut) and event.entry.value == b"2":
                    break
        assert (await store.txn([], [Delete("/a/x")])).succeeded
    await store.close()
    for user, text in (("root", "etcd refused user 'root'"), ("", "user name is empty")):
        wrong = EtcdStore(EtcdLocation((own_etcd.endpoint,), user=user, password="wrong"))
        with pytest.raises(StoreError, match=text) as error:
            await open_and_read(wrong)
        assert "wrong" not in error.value.message
        await wrong.close()


async def open_and_read(store: EtcdStore) -> None:
    await store.open()
    await store.get("/a/x")


async def test_calls_of_a_store_that_is_not_open_are_refused() -> None:
    store = EtcdStore(EtcdLocation(("127.0.0.1:1",)))
    with pytest.raises(StoreError, match="not open"):
        await store.get("/a")
    await store.close()


@pytest.mark.skipif(
    tuple(int(part) for part in grpc.__version__.split(".")[:2]) < (1, 80),
    reason="its TLS does not know the curve of etcd's own certificate",
)
async def test_connection_uses_tls(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, tls=True)
    server.start()
    try:
        trusting = EtcdStore(EtcdLocation((server.endpoint,), tls=True, ca_pem=server.certificate))
        await trusting.open()
        await trusting.put("/a", b"1")
        async with aclosing(trusting.watch("/")) as events:
            await take(events, 1)
        await trusting.close()
        for location in (EtcdLocation((server.endpoint,), tls=True), EtcdLocation((server.endpoint,))):
            other = EtcdStore(location, connect_timeout_s=0.5)
            with pytest.raises(StoreError):
                await open_and_read(other)
            await other.close()
    finally:
        server.kill()


@pytest.mark.skipif(
    tuple(int(part) for part in grpc.__version__.split(".")[:2]) < (1, 80),
    reason="its TLS does not know the curve of etcd's own certificate",
)
async def test_etcd_store_follows_a_replaced_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """etcd gets another certificate, and the file with its authority is replaced: no restart of the pod."""
    monkeypatch.setattr("mesh.store.etcd_connection.FILES_POLL_S", 0.05)
    server = EtcdServer(tmp_path, tls=True)
    server.start()
    try:
        authority = tmp_path / "ca.pem"
        authority.write_bytes(server.certificate)
        text = f"etcds://{server.endpoint}?ca={authority}"
        store = store_at(parse_store(text), lambda: parse_store(text))
        await store.open()
        await store.put("/a", b"1")
        server.wipe()
        server.start()
        authority.write_bytes(server.certificate)

        async def is_back() -> bool:
            try:
                await store.put("/a", b"2")
            except StoreError:
                return False
            return True

        await until_async(is_back, 20)
        await store.close()
    finally:
        server.kill()
