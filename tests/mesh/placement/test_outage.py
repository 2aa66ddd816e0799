"""Pods over a real etcd that is stopped: they share their loads without it, and the records are right when it is back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from msgspec.structs import replace

from common.model_state import CopyState, ModelState
from mesh.errors import StoreError
from mesh.placement.learned_copies import LearnedCopies
from mesh.registry.records import Failure, InstanceRecord, ModelRecord
from tests.support.etcd import EtcdServer
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until

STATE = ModelState(state=CopyState.UNLOADING)
MODELS = tuple(f"m{number}" for number in range(8))


@pytest.fixture
async def pods(tmp_path: Path, own_etcd: EtcdServer) -> AsyncIterator[Sequence[RunningPod]]:
    """Three pods that know all models, of which none is loaded. Their etcd is stopped."""
    async with AsyncExitStack() as stack:
        running = [
            await stack.enter_async_context(running_pod(tmp_path / name, store=own_etcd.url))
            for name in ("a", "b", "c")
        ]
        for model_id in MODELS:
            await running[0].register(model_id, f"/{model_id}")
        await until(lambda: all(set(pod.pod.registry.models.table) == set(MODELS) for pod in running))
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 3 for pod in running))
        await until(
            lambda: all(record.capacity_units for pod in running for _, record in pod.pod.registry.instances.live())
        )
        own_etcd.kill()
        # A call that got no answer: no stream has one left to read either.
        for error in await asyncio.gather(*(pod.pod.store.get("/") for pod in running), return_exceptions=True):
            assert isinstance(error, StoreError)
        yield running


def loads_of(pods: Sequence[RunningPod]) -> Counter[str]:
    return Counter(model_id for pod in pods for verb, model_id in pod.runtime.log if verb == "load")


async def test_models_are_loaded_once_while_etcd_is_away(pods: Sequence[RunningPod], own_etcd: EtcdServer) -> None:
    calls = [pod.echo(model_id, timeout=20) for model_id in MODELS for pod in pods]
    assert await asyncio.gather(*calls) == [b"hi"] * len(calls)
    assert loads_of(pods) == dict.fromkeys(MODELS, 1)
    assert sum(bool(pod.runtime.loaded) for pod in pods) > 1, "one pod must not load everything"
    own_etcd.start()
    await until(lambda: all(pod.pod.store.is_answering for pod in pods))
    holders = {model_id: pod.pod.instance_id for pod in pods for model_id in pod.runtime.loaded}
    for pod in pods:
        await pod.pod.reconciler.sweep()
    for model_id in MODELS:
        record = await pods[0].pod.registry.models.table.refresh(model_id)
        assert record is not None
        assert list(record.instance_ids) == [holders[model_id]]


async def test_a_model_evicted_while_etcd_is_away_is_loaded_once_more(pods: Sequence[RunningPod]) -> None:
    await asyncio.gather(*(pod.echo("m0", timeout=20) for pod in pods))
    holder = next(pod for pod in pods if "m0" in pod.runtime.loaded)
    await holder.pod.placement.unload_locally("m0", now=True)
    assert await asyncio.gather(*(pod.echo("m0", timeout=20) for pod in pods)) == [b"hi"] * 3
    assert loads_of(pods)["m0"] == 2


async def test_a_copy_learned_of_without_etcd_may_be_gone_when_etcd_is_back(
    pods: Sequence[RunningPod], own_etcd: EtcdServer
) -> None:
    await asyncio.gather(*(pod.echo("m0", timeout=20) for pod in pods))
    holder = next(pod for pod in pods if "m0" in pod.runtime.loaded)
    own_etcd.start()
    await until(lambda: all(pod.pod.store.is_answering for pod in pods))
    await holder.pod.placement.unload_locally("m0", now=True)
    assert await asyncio.gather(*(pod.echo("m0", timeout=20) for pod in pods)) == [b"hi"] * 3


async def test_a_model_that_fails_to_load_while_etcd_is_away_is_tried_by_each_pod_once(
    pods: Sequence[RunningPod],
) -> None:
    for pod in pods:
        pod.runtime.switches.fail["/m0"] = "broken"
    for pod in (pods[0], pods[0]):
        with pytest.raises(grpc.aio.AioRpcError, match="broken"):
            await pod.echo("m0", timeout=20)
    assert loads_of(pods)["m0"] <= 3


async def test_a_load_whose_end_a_caller_waits_for_takes_place_here_while_etcd_is_away(
    pods: Sequence[RunningPod],
) -> None:
    for pod in pods:
        await pod.load("m0")
        assert "m0" in pod.runtime.loaded


def test_learned_copies_complete_the_record_only_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    away = True
    learned = LearnedCopies(lambda: away)
    record = ModelRecord(type="llm", instance_ids={"a": 1, "b": 2})
    assert learned.applied_to("m", record) is record
    learned.gained("m", "c")
    learned.lost("m", "a", 1)
    learned.failed("m", "d", Failure("broken"))
    seen = learned.applied_to("m", record)
    assert seen.instance_ids.keys() == {"b", "c"}
    assert seen.failed_in.keys() == {"d"}
    assert seen.failures == {"d": Failure("broken")}
    assert learned.applied_to("m", record, with_copies=False).instance_ids == {"b": 2}
    loaded_again = replace(record, instance_ids={"a": 3})
    assert learned.applied_to("m", loaded_again).instance_ids.keys() == {"a", "c"}
    assert learned.applied_to("other", record) is record
    learned.lost("m", "c", 0)
    assert learned.applied_to("m", record).instance_ids == {"b": 2}
    assert learned.refuses("m", "c"), "it was asked to load the model and then did not have it"
    assert not learned.refuses("m", "a")
    learned.gained("m", "e")
    away = False
    learned.gained("m", "f")
    assert learned.applied_to("m", record).instance_ids.keys() == {"b", "e"}, "records are corrected some seconds later"
    learned.lost("m", "e", 0)
    assert learned.applied_to("m", record).instance_ids == {"b": 2}
    monkeypatch.setattr("mesh.placement.learned_copies._KEPT_S", 0.0)
    assert learned.applied_to("m", record) is record


def test_learned_copies_are_newer_than_the_reports_of_their_pods() -> None:
    learned = LearnedCopies(lambda: True)
    pods = {"a": InstanceRecord(copies={"m": STATE, "n": STATE}), "b": InstanceRecord(copies={"m": STATE})}
    assert learned.without_old_reports("m", pods) is pods
    learned.gained("m", "a")
    seen = learned.without_old_reports("m", pods)
    assert (seen["a"].copies, seen["b"].copies) == ({"n": STATE}, {"m": STATE})
