"""The names that a registry lists: made once for many readers, and never behind the tables that they come from."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh.errors import InvalidRequest, MeshError
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.record_updates import RecordUpdates
from mesh.registry.registration import check_name, model_info
from mesh.registry.registry import Registry
from mesh.store.embedded import EmbeddedStore
from mesh.types import ModelInfo


def info(name: str, uri: str) -> ModelInfo:
    return model_info(name, uri, {})


def answering(loaded: bool) -> Callable[[str], bool]:
    return lambda _: loaded


def info_of(registry: Registry, model_id: str) -> ModelInfo:
    record = registry.models.get(model_id)
    assert record is not None
    return record.info


@pytest.mark.parametrize("seed", range(5))
async def test_registry_named_equals_find_named_after_any_change(seed: int, tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    registry = Registry(
        store,
        root_prefix="",
        kv_prefix="mm",
        service_name="s",
        instance_id="pod",
        session_ttl_s=25,
        default_owner="repertory",
    )
    await registry.start()
    chance = random.Random(seed)
    names = ["a", "b", "c", "d", "e"]
    changes = 0
    for _ in range(150):
        before = registry.named()
        one, other = chance.choice(names), chance.choice(names)
        loaded = chance.random() < 0.5
        try:
            match chance.randrange(8):
                case 0 | 1:
                    await registry.register_name(
                        one, info(one, f"/{chance.randrange(3)}"), now_ms=1, is_loaded=answering(loaded)
                    )
                case 2:
                    await registry.set_alias(one, other, now_ms=1, is_loaded=lambda _: True)
                case 3:
                    await registry.remove_name(one)
                case 4:
                    await registry.models.register(one, info("", f"/{one}"), last_used_ms=1)
                case 5:
                    vmodel = registry.vmodels.get(one)
                    if vmodel is not None:
                        await registry.vmodels.park(one, target_id=vmodel.target_id)
                case 6 | 7:
                    vmodel = registry.vmodels.get(one)
                    if vmodel is not None:  # from now on the name moves only when what it moves to is loaded
                        await RecordUpdates(registry.models, "pod", LearnedCopies(lambda: False)).loading(
                            vmodel.active_id, info_of(registry, vmodel.active_id), started_ms=1, last_used_ms=1
                        )
        except MeshError:
            assert registry.named() is before, "nothing has changed"
        changes += registry.named() != before
        assert registry.named() is registry.named()
        listed = {named.name: named for named in registry.named()}
        for name in {*names, *listed}:
            assert registry.find_named(name) == listed.get(name)
    assert changes > 20
    await registry.close()
    await store.close()


@pytest.mark.parametrize(
    "name", ["", "a b", "a?b", "a#b", "a,b", "a\n", "*a", "/a", "a/", "a//b", ".", "..", "../a", "a/./b", "x" * 201]
)
def test_check_name_refuses_names_that_no_url_or_header_carries(name: str) -> None:
    with pytest.raises(InvalidRequest):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "org/model", "a.b", "...", ".a/b.", "a%2Fb", "日本", "a__b", "x" * 200])
def test_check_name_accepts_common_model_names(name: str) -> None:
    check_name(name)
