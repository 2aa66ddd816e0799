"""Ids of pods that are gone for good leave the records; those of pods that are there, or were a moment ago, stay."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.reaper import Reaper
from mesh.placement.record_updates import RecordUpdates
from mesh.registry.records import InstanceRecord
from mesh.registry.registry import Registry
from mesh.store.embedded import EmbeddedStore
from mesh.types import ModelInfo

INFO = ModelInfo("llm", "/m")


def pods_of_m(registry: Registry) -> list[str]:
    record = registry.models.get("m")
    assert record is not None
    return sorted(record.instance_ids)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    store = EmbeddedStore(tmp_path / "registry")
    await store.open()
    registry = Registry(
        store,
        root_prefix="",
        kv_prefix="mm",
        service_name="svc",
        instance_id="here",
        session_ttl_s=5.0,
        default_owner="repertory",
    )
    await registry.start()
    for model_id in ("m", "n", "other"):
        await registry.models.register(model_id, INFO, last_used_ms=1)
    for pod_id in ("here", "dead", "young"):
        await RecordUpdates(registry.models, pod_id, LearnedCopies(lambda: False)).loading(
            "m", INFO, started_ms=7, last_used_ms=1
        )
    await RecordUpdates(registry.models, "dead", LearnedCopies(lambda: False)).failed("n", "broke", at_ms=9)
    yield registry
    await registry.close()
    await store.close()


async def test_reaper_clears_out_pods_that_are_away_for_long(registry: Registry) -> None:
    reaper = Reaper(registry, is_leader=lambda: True, away_s=600.0)
    await reaper.sweep(0.0)
    await registry.instances.publish(InstanceRecord(start_time_ms=1))
    await registry.instances.table.until("here", lambda record: record is not None)
    other_before = registry.models.get("other")
    for now_s in (1.0, 600.0):
        await reaper.sweep(now_s)
        assert pods_of_m(registry) == ["dead", "here", "young"]
    await RecordUpdates(registry.models, "young", LearnedCopies(lambda: False)).gone("m")
    await reaper.sweep(601.0)
    m, n = registry.models.get("m"), registry.models.get("n")
    assert m is not None
    assert n is not None
    assert dict(m.instance_ids) == {"here": 7}
    assert (n.failed_in, n.failures) == ({}, {})
    assert registry.models.get("other") == other_before
    # who comes back is announced anew, and starts from nothing if it leaves again
    await RecordUpdates(registry.models, "dead", LearnedCopies(lambda: False)).loading(
        "m", INFO, started_ms=8, last_used_ms=1
    )
    await reaper.sweep(700.0)
    assert "dead" in pods_of_m(registry)


async def test_reaper_runs_on_the_leader_only(registry: Registry) -> None:
    await registry.instances.publish(InstanceRecord(start_time_ms=1))
    await registry.instances.table.until("here", lambda record: record is not None)
    is_leader = False
    reaper = Reaper(registry, is_leader=lambda: is_leader, away_s=600.0)
    for now_s in (0.0, 1000.0):
        await reaper.sweep(now_s)
    assert "dead" in pods_of_m(registry)
    is_leader = True
    await reaper.sweep(1001.0)
    assert "dead" not in pods_of_m(registry)
