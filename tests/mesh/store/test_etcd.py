"""Calls to etcd: servers that are down, several endpoints, answers that are lost, passwords and certificates."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest

from mesh.errors import StoreError, StoreUncertain
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_lease import KEEP_ALIVE
from mesh.store.factory import store_at
from mesh.store.location import EtcdLocation, parse_store
from mesh.store.protocol import Compare, Delete, EntryPut, Put
from tests.support.etcd import EtcdServer, free_port
from tests.support.etcd_stores import connected, opened, take
from tests.support.waiting import until_async
from wire import etcd_pb2 as pb


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
