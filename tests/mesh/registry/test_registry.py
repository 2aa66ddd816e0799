"""Names over models: what a registry has learnt change by change equals what one that starts now reads."""

import asyncio
import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.access.caller import Caller, set_caller
from mesh.errors import MeshError, NotFound
from mesh.registry.records import Failure, ModelRecord, encode_record
from mesh.registry.registration import model_info
from mesh.registry.registry import Registry
from mesh.store.embedded import EmbeddedStore
from mesh.store.protocol import Put

names = st.sampled_from(["a", "b", "c"])
steps = st.one_of(
    st.tuples(st.just("register"), names, st.sampled_from(["/x", "/y"])),
    st.tuples(st.just("alias"), st.sampled_from(["p", "q"]), names),
    st.tuples(st.just("remove"), names, st.just("")),
    st.tuples(st.just("remove alias"), st.sampled_from(["p", "q"]), st.just("")),
)


def registry_of(store: EmbeddedStore) -> Registry:
    return Registry(
        store,
        root_prefix="",
        kv_prefix="mm",
        service_name="test",
        instance_id="a",
        session_ttl_s=10.0,
        default_owner="",
    )


async def take(registry: Registry, kind: str, name: str, argument: str) -> None:
    if kind == "register":
        await registry.register_name(name, model_info(name, argument, {}), now_ms=1, is_loaded=lambda _: False)
    elif kind == "alias":
        await registry.set_alias(name, argument, now_ms=1, is_loaded=lambda _: False)
    elif kind == "remove":
        await registry.remove_name(name)
    else:
        await registry.remove_alias(name)


async def live(taken: list[tuple[str, str, str]], directory: Path) -> None:
    store = EmbeddedStore(directory)
    await store.open()
    registry = registry_of(store)
    await registry.start()
    for step in taken:
        try:
            await take(registry, *step)
            assert registry.names() == [named.name for named in registry.named()]
        except MeshError:
            continue  # the step makes no sense now
    fresh = registry_of(store)
    await fresh.start()
    assert registry.named() == fresh.named()
    assert registry.names() == [named.name for named in fresh.named()]
    assert {name.name: registry.find_named(name.name) for name in fresh.named()} == {
        name.name: name for name in fresh.named()
    }
    for named in fresh.named():
        assert registry.name_of(named.model_id) == fresh.name_of(named.model_id)
    for each in (fresh, registry):
        await each.close()
    await store.close()


@settings(deadline=None, max_examples=30)
@given(st.lists(steps, max_size=12))
def test_registry_names_do_not_depend_on_the_order_of_what_was_seen(taken: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(live(taken, Path(directory)))


placements = st.lists(
    st.tuples(
        st.sampled_from(["m", "n"]),
        st.builds(
            ModelRecord,
            instance_ids=st.dictionaries(st.sampled_from(["a", "b"]), st.just(1), max_size=2),
            failed_in=st.dictionaries(st.just("c"), st.just(1), max_size=1),
            failures=st.dictionaries(st.just("c"), st.just(Failure("no room")), max_size=1),
        )
        | st.none(),
    ),
    max_size=8,
)


def _replaced(record: ModelRecord | None, _: ModelRecord | None) -> ModelRecord | None:
    return record


async def place(taken: list[tuple[str, ModelRecord | None]], directory: Path) -> None:
    store = EmbeddedStore(directory)
    await store.open()
    registry = registry_of(store)
    await registry.start()
    for model_id, record in taken:
        await registry.models.table.update(model_id, functools.partial(_replaced, record))
    in_pods = [
        (model_id, record)
        for model_id, record in registry.models.table.items()
        if record.instance_ids or record.failed_in or record.failures
    ]
    assert registry.models.placed() == in_pods
    await registry.close()
    await store.close()


@settings(deadline=None, max_examples=30)
@given(placements)
def test_placed_models_are_those_whose_records_name_a_pod(taken: list[tuple[str, ModelRecord | None]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(place(taken, Path(directory)))


async def test_refusal_of_an_unknown_name_quotes_names_beside_it(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    registry = registry_of(store)
    record = encode_record(ModelRecord(type="llm"))
    await store.txn([], [Put(f"/mm/test/registry/org{number % 5}/model-{number}", record) for number in range(2000)])
    await registry.start()
    with pytest.raises(NotFound, match=r"served here: org3/model-1238, .* and 1990 more"):
        registry.resolve("org3/model-1238x")
    set_caller(Caller("key", models=("org4/*",)))
    with pytest.raises(NotFound, match=r"served here: org4/model-1004, .* and others"):
        registry.resolve("abc")
    set_caller(Caller("key", models=("none/*",)))
    with pytest.raises(NotFound, match="no model is registered"):
        registry.resolve("abc")
    await registry.close()
    await store.close()
