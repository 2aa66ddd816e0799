"""A watched table: cache, own writes, others' writes, listeners, a store that goes away or back in time."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import StoreError, StoreUncertain
from mesh.registry.models import Models
from mesh.registry.records import ModelRecord, decode_record
from mesh.registry.table import Table
from mesh.registry.vmodel_plan import VModelRequest
from mesh.registry.vmodels import VModels
from mesh.store.embedded import EmbeddedStore
from mesh.store.etcd import EtcdStore
from mesh.store.location import EtcdLocation
from mesh.store.protocol import Compare, Listing, TxnResult, Write
from mesh.types import ModelInfo
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


async def test_table_reads_own_writes_at_once_and_notifies_other_tables(
    tables: tuple[Table[ModelRecord], Table[ModelRecord]],
) -> None:
    mine, other = tables
    heard: list[tuple[str, int | None, int | None]] = []
    mine.listen(
        lambda model_id, old, new: heard.append((model_id, old.refs if old else None, new.refs if new else None))
    )
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


async def test_update_from_two_tables_at_once_loses_nothing(
    tables: tuple[Table[ModelRecord], Table[ModelRecord]],
) -> None:
    await asyncio.gather(*(table.update("m", one_more_ref) for table in tables for _ in range(10)))
    got = (await tables[0].read("m")).record
    assert got is not None
    assert got.refs == 20


async def test_update_does_not_write_an_unchanged_record(
    store: EmbeddedStore, tables: tuple[Table[ModelRecord], Table[ModelRecord]]
) -> None:
    await tables[0].update("m", one_more_ref)
    before = (await store.get_prefix(PREFIX)).revision
    await tables[0].update("m", lambda old: old)
    await tables[0].update("absent", lambda old: old)
    assert (await store.get_prefix(PREFIX)).revision == before


async def test_table_skips_undecodable_records_and_find_names_them(
    store: EmbeddedStore, tables: tuple[Table[ModelRecord], Table[ModelRecord]]
) -> None:
    await store.put(PREFIX + "bad", b"not json")
    await store.put(PREFIX + "good", b"{}")
    async with asyncio.timeout(10):
        await tables[0].until("good", lambda record: record is not None)
    assert tables[0].get("bad") is None
    with pytest.raises(StoreError, match="/mm/svc/registry/bad holds no ModelRecord"):
        await tables[0].read("bad")


async def test_table_outlives_a_failing_listener(
    tables: tuple[Table[ModelRecord], Table[ModelRecord]],
) -> None:
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


class DoubtfulStore:
    """Every other transaction happens, or not, and its answer is lost."""

    def __init__(self, inner: EmbeddedStore, *, happens: bool, losses: int) -> None:
        self._inner = inner
        self._happens = happens
        self.losses = losses
        self.get, self.watch = inner.get, inner.watch

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        if not self.losses:
            return await self._inner.txn(compares, writes)
        self.losses -= 1
        if self._happens:
            await self._inner.txn(compares, writes)
        raise StoreUncertain("store: the answer was lost")


@pytest.mark.parametrize("happens", [True, False])
async def test_update_reads_back_after_a_lost_answer(store: EmbeddedStore, happens: bool) -> None:
    doubtful = DoubtfulStore(store, happens=happens, losses=1)
    models = Models(doubtful, PREFIX)  # type: ignore[arg-type]
    vmodels = VModels(doubtful, "/mm/svc/vmodels/", models, default_owner="o")  # type: ignore[arg-type]
    info = ModelInfo("llm", "/m")
    assert (await models.register("m", info, last_used_ms=1)).info == info
    for vmodel_id, losses in (("v", 1), ("w", 1), ("x", 0)):
        doubtful.losses = losses
        await vmodels.set(VModelRequest(vmodel_id, "m"), now_ms=1, is_loaded=lambda _: False)
    doubtful.losses = 1
    await vmodels.delete("v")
    got = (await models.table.read("m")).record
    assert got is not None
    assert got.refs == 2
    if not happens:
        for call in (models.touch("m", 99), vmodels.delete("w")):
            doubtful.losses = 2
            with pytest.raises(StoreUncertain):
                await call


class LateStore:
    """The answer to a transaction comes only when the gate is open: by then the watch may long be past it."""

    def __init__(self, inner: EmbeddedStore) -> None:
        self._inner = inner
        self.gate = asyncio.Event()
        self.get, self.watch = inner.get, inner.watch

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        result = await self._inner.txn(compares, writes)
        await self.gate.wait()
        return result


async def test_update_answered_after_a_deletion_does_not_restore_the_record(
    store: EmbeddedStore,
) -> None:
    late = LateStore(store)
    table = Table(late, PREFIX, ModelRecord)  # type: ignore[arg-type]
    await table.start()
    write = asyncio.create_task(table.update("m", one_more_ref))
    async with asyncio.timeout(10):
        await table.until("m", lambda record: record is not None)
        await store.delete(PREFIX + "m")
        await table.until("m", lambda record: record is None)
        late.gate.set()
        await write
    assert table.get("m") is None
    await table.close()


@pytest.mark.parametrize("kind", ["embedded", "etcd"])
async def test_table_does_not_keep_the_listing(kind: str, store: EmbeddedStore, request: pytest.FixtureRequest) -> None:
    """The next event may be hours away, and a listing of 100,000 records takes 48 MB."""
    etcd = None
    if kind == "etcd":
        server: EtcdServer = request.getfixturevalue("etcd")
        etcd = EtcdStore(EtcdLocation((server.endpoint,)))
        await etcd.open()
    table = Table(etcd or store, f"/unkept/{kind}/", ModelRecord)
    await table.update("m", one_more_ref)
    await table.start()
    assert table.get("m") == ModelRecord(type="llm", refs=1)
    listings = [kept for kept in gc.get_objects() if type(kept) is Listing]
    assert not [entry.key for listing in listings for entry in listing.entries if entry.key.startswith("/unkept/")]
    await table.close()
    if etcd is not None:
        await etcd.close()


async def test_find_reads_the_store_only_for_absent_records(store: EmbeddedStore) -> None:
    table = Table(store, PREFIX, ModelRecord)  # never started: its cache hears of nothing
    assert await table.find("m") is None
    await store.put(PREFIX + "m", b'{"refs":1}')
    first = await table.find("m")
    await store.put(PREFIX + "m", b'{"refs":2}')
    assert await table.find("m") == first
    assert (await table.read("m")).record == ModelRecord(refs=2)


async def test_table_serves_while_etcd_is_away_and_catches_up(own_etcd: EtcdServer) -> None:
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


async def test_table_follows_a_store_that_lost_everything(own_etcd: EtcdServer) -> None:
    stores = [EtcdStore(EtcdLocation((own_etcd.endpoint,))) for _ in range(2)]
    for store in stores:
        await store.open()
    table, other = (Table(store, PREFIX, ModelRecord) for store in stores)
    for each in (table, other):
        await each.start()
    for _ in range(5):
        await other.update("m", one_more_ref)
    # by its watch, which is the one that has to notice: a watch that lags behind the loss cannot tell the two stores apart
    await table.until("m", lambda record: record is not None and record.refs == 5)
    await other.close()
    own_etcd.wipe()
    own_etcd.start()
    async with asyncio.timeout(60):
        await table.until("m", lambda record: record is None)
    await table.update("m", one_more_ref)
    assert table.get("m") == ModelRecord(type="llm", refs=1)
    await table.close()
    for store in stores:
        await store.close()


ids = st.sampled_from(["a", "b", "c"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), ids, st.integers(0, 1)),
        st.tuples(st.just("delete"), ids, st.integers(0, 1)),
        st.tuples(st.just("foreign"), ids, st.integers(0, 9)),
        st.tuples(st.just("read"), ids, st.integers(0, 1)),
        st.tuples(st.just("pause"), ids, st.integers(0, 3)),
        st.tuples(st.just("race"), ids, st.integers(0, 63)),
    ),
    max_size=20,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
async def test_listeners_get_each_change_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, script: list[tuple[str, str, int]]
) -> None:
    """Own writes, the other pod's, and writes past both, with the watch running late: each change is told once, from what was told before."""
    store = EmbeddedStore(tmp_path_factory.mktemp("story"))
    await store.open()
    both = (Table(store, PREFIX, ModelRecord), Table(store, PREFIX, ModelRecord))
    told: tuple[dict[str, ModelRecord | None], ...] = ({}, {})

    def listener(story: dict[str, ModelRecord | None]) -> Callable[[str, ModelRecord | None, ModelRecord | None], None]:
        def hear(model_id: str, old: ModelRecord | None, new: ModelRecord | None) -> None:
            assert story.get(model_id) == old != new
            story[model_id] = new

        return hear

    errors: list[BaseException] = []
    for table, story in zip(both, told, strict=True):
        hear = listener(story)

        def safe(
            model_id: str, old: ModelRecord | None, new: ModelRecord | None, hear: Callable[..., None] = hear
        ) -> None:
            try:
                hear(model_id, old, new)
            except AssertionError as error:
                errors.append(error)

        table.listen(safe)
        await table.start()
    for action, model_id, number in script:
        match action:
            case "add":
                await both[number].update(model_id, one_more_ref)
            case "delete":
                await both[number].update(model_id, lambda _: None)
            case "foreign":
                await store.put(PREFIX + model_id, b'{"refs":%d}' % (number + 100))
            case "read":
                await both[number].read(model_id)
            case "race":
                moves = [(both[number >> 2 * bit & 1], number >> 2 * bit & 2) for bit in range(3)]
                await asyncio.gather(
                    *(table.update(model_id, one_more_ref if add else lambda _: None) for table, add in moves)
                )
            case "pause":
                for _ in range(number):
                    await asyncio.sleep(0)
    await store.put(PREFIX + "end", b"{}")
    truth = {
        entry.key.removeprefix(PREFIX): decode_record(ModelRecord, entry.value)
        for entry in (await store.get_prefix(PREFIX)).entries
    }
    for table, story in zip(both, told, strict=True):
        async with asyncio.timeout(10):
            await table.until("end", lambda record: record is not None)
        assert dict(table.items()) == truth
        assert {model_id: record for model_id, record in story.items() if record is not None} == truth
        assert table.num_unconfirmed_deletions == 0
        await table.close()
    assert not errors
    await store.close()


async def test_refresh_reads_changes_that_the_watch_has_not_reported(store: EmbeddedStore) -> None:
    lagging, other = (Table(store, PREFIX, ModelRecord) for _ in range(2))
    await lagging.update("m", one_more_ref)
    await other.update("m", one_more_ref)
    assert lagging.get("m") == ModelRecord(type="llm", refs=1), "its watch was never started"
    assert await lagging.refresh("m") == ModelRecord(type="llm", refs=2)
    await other.update("m", lambda _: None)
    assert await lagging.refresh("m") is None
