"""A watched table: cache, own writes, others' writes, listeners, a store that goes away or back in time."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from mesh.errors import StoreError
from mesh.registry.records import ModelRecord
from mesh.registry.table import Table
from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EtcdLocation
from tests.support.etcd import EtcdServer

PREFIX = "/mm/svc/registry/"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(tmp_path)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def tables(store: EmbeddedStore) -> AsyncIterator[tuple[Table[ModelRecord], Table[ModelRecord]]]:
    """Two pods' views of the same records."""
    both = (Table(store, PREFIX, ModelRecord), Table(store, PREFIX, ModelRecord))
    for table in both:
        await table.start()
    yield both
    for table in both:
        await table.close()


def one_more_ref(old: ModelRecord | None) -> ModelRecord:
    old = old or ModelRecord(type="llm")
    return msgspec.structs.replace(old, refs=old.refs + 1)


async def test_own_writes_are_read_at_once_and_others_hear_of_them(tables: tuple[Table[ModelRecord], Table[ModelRecord]]) -> None:
    mine, other = tables
    heard: list[tuple[str, int | None, int | None]] = []
    mine.listen(lambda model_id, old, new: heard.append((model_id, old and old.refs, new and new.refs)))
    await mine.update("m/ä", one_more_ref)
    await mine.update("m/ä", one_more_ref)
    got = mine.get("m/ä")
    assert got is not None
    assert got.refs == 2
    async with asyncio.timeout(10):
        await other.until("m/ä", lambda record: record is not None and record.refs == 2)
        await other.update("m/ä", lambda _: None)
        assert other.get("m/ä") is None
        await mine.until("m/ä", lambda record: record is None)
    assert heard == [("m/ä", None, 1), ("m/ä", 1, 2), ("m/ä", 2, None)]
    assert list(mine) == []


async def test_concurrent_updates_from_both_lose_nothing(tables: tuple[Table[ModelRecord], Table[ModelRecord]]) -> None:
    await asyncio.gather(*(table.update("m", one_more_ref) for table in tables for _ in range(10)))
    got = (await tables[0].read("m")).record
    assert got is not None
    assert got.refs == 20


async def test_an_unchanged_record_is_not_written(store: EmbeddedStore, tables: tuple[Table[ModelRecord], Table[ModelRecord]]) -> None:
    await tables[0].update("m", one_more_ref)
    before = (await store.get_prefix(PREFIX)).revision
    await tables[0].update("m", lambda old: old)
    await tables[0].update("absent", lambda old: old)
    assert (await store.get_prefix(PREFIX)).revision == before


async def test_what_cannot_be_decoded_is_ignored_by_the_cache_and_named_by_a_read(
    store: EmbeddedStore, tables: tuple[Table[ModelRecord], Table[ModelRecord]]
) -> None:
    await store.put(PREFIX + "bad", b"not json")
    await store.put(PREFIX + "good", b"{}")
    async with asyncio.timeout(10):
        await tables[0].until("good", lambda record: record is not None)
    assert tables[0].get("bad") is None
    with pytest.raises(StoreError, match="/mm/svc/registry/bad holds no ModelRecord"):
        await tables[0].read("bad")


async def test_a_failing_listener_does_not_stop_the_table(tables: tuple[Table[ModelRecord], Table[ModelRecord]]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("listener")

    heard: list[str] = []
    tables[1].listen(fail)
    tables[1].listen(lambda model_id, *_: heard.append(model_id))
    await tables[0].update("a", one_more_ref)
    await tables[0].update("b", one_more_ref)
    async with asyncio.timeout(10):
        await tables[1].until("b", lambda record: record is not None)
    assert heard == ["a", "b"]


async def test_find_asks_the_store_only_for_what_is_absent(store: EmbeddedStore) -> None:
    table = Table(store, PREFIX, ModelRecord)      # never started: its cache hears of nothing
    assert await table.find("m") is None
    await store.put(PREFIX + "m", b'{"refs":1}')
    first = await table.find("m")
    await store.put(PREFIX + "m", b'{"refs":2}')
    assert await table.find("m") == first
    assert (await table.read("m")).record == ModelRecord(refs=2)


async def test_a_table_serves_while_etcd_is_away_and_catches_up(own_etcd: EtcdServer) -> None:
    store = EtcdStore(EtcdLocation((own_etcd.endpoint,)), call_timeout_s=0.5)
    await store.open()
    table = Table(store, PREFIX, ModelRecord)
    await table.start()
    await table.update("kept", one_more_ref)
    await table.update("gone", one_more_ref)
    own_etcd.kill()
    assert table.get("kept") is not None
    with pytest.raises(StoreError):
        await table.update("kept", one_more_ref)
    own_etcd.start()
    other = EtcdStore(EtcdLocation((own_etcd.endpoint,)))
    await other.open()
    await other.delete(PREFIX + "gone")
    async with asyncio.timeout(20):
        await table.until("gone", lambda record: record is None)
    assert table.get("kept") == ModelRecord(type="llm", refs=1)
    await table.close()
    await other.close()
    await store.close()


async def test_a_store_that_lost_everything_is_believed(own_etcd: EtcdServer) -> None:
    store = EtcdStore(EtcdLocation((own_etcd.endpoint,)))
    await store.open()
    table = Table(store, PREFIX, ModelRecord)
    await table.start()
    for _ in range(5):
        await table.update("m", one_more_ref)
    own_etcd.wipe()
    own_etcd.start()
    async with asyncio.timeout(20):
        await table.until("m", lambda record: record is None)
    await table.update("m", one_more_ref)
    assert table.get("m") == ModelRecord(type="llm", refs=1)
    await table.close()
    await store.close()
