"""Copies that are added for queues and minimums, dropped when idle, handed over, and never cut for another model."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.changes import Changes
from common.model_key import CopySettings
from common.model_state import CopyState
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.copy_scaling import IDLE_S, QUEUED_S, Change, CopyLoad, plan_copies
from mesh.types import ModelInfo
from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until, until_async

policies = st.builds(
    CopySettings,
    min_copies=st.integers(0, 4),
    max_copies=st.sampled_from([None, 1, 2, 3, 4]),
    idle_timeout_s=st.sampled_from([None, 10.0, 100.0]),
)
loads = st.builds(
    CopyLoad,
    num_copies=st.integers(1, 5),
    num_pods=st.integers(1, 5),
    is_first=st.booleans(),
    queued_s=st.floats(0, 20),
    idle_s=st.floats(0, 200),
)


@given(loads, policies)
def test_copies_keep_to_the_policy(load: CopyLoad, policy: CopySettings) -> None:
    change = plan_copies(load, policy)
    if change is Change.ADD:
        assert load.is_first, "one pod adds"
        assert load.num_copies < load.num_pods
        assert load.queued_s >= QUEUED_S or load.num_copies < policy.min_copies
        assert not policy.max_copies or load.num_copies < max(policy.max_copies, policy.min_copies)
    if change is Change.DROP:
        has_timed_out = policy.idle_timeout_s and load.idle_s >= policy.idle_timeout_s
        exceeds = load.num_copies > min(policy.max_copies or load.num_pods, load.num_pods)
        assert has_timed_out or exceeds or load.idle_s >= IDLE_S
        if not has_timed_out:
            assert not load.is_first, "the last copy is only dropped by its timeout"
            assert load.num_copies > 1
    if load.num_copies <= min(policy.min_copies, load.num_pods):
        assert change is not Change.DROP or load.num_copies > (policy.max_copies or load.num_pods)


def test_copies_end_of_requests_is_a_change_only_while_a_load_or_unload_may_wait_for_it() -> None:
    changes = Changes()
    copies = LocalCopies(changes, lambda _: CopySettings())

    def is_change() -> bool:
        copies.begin("m")
        before = changes.version
        copies.end("m")
        return changes.version > before

    ours, other = LocalCopy("m", ModelInfo("llm", "/m")), LocalCopy("other", ModelInfo("llm", "/other"))
    copies.add(ours)
    assert is_change(), "it waits to be loaded"
    copies.set_state(ours, CopyState.LOADED)
    assert not is_change()
    copies.add(other)
    assert is_change(), "another one may wait for the room"
    copies.remove(other)
    assert not is_change()
    copies.set_state(ours, CopyState.UNLOADING)
    assert is_change(), "the unload waits for its requests"
    copies.remove(ours)
    assert not is_change()


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[list[RunningPod]]:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(running_pod(tmp_path / name, store=store)) for name in "abc"]
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 3 for pod in made))
        yield made


def holders(pods: list[RunningPod], model_id: str) -> int:
    return sum(model_id in pod.runtime.loaded for pod in pods)


async def adjust(pods: list[RunningPod], later_s: float) -> None:
    """Have every pod adjust its copies now and, as if time had passed, `later_s` from now."""
    now_s = time.monotonic()
    for after_s in (0.0, later_s):
        for pod in pods:
            await pod.pod.scaler.sweep(now_s + after_s)


async def test_copies_are_added_for_a_queue_and_dropped_when_idle(
    pods: list[RunningPod], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.placement.copy_scaling.IDLE_S", 0.5)
    model_id = (await pods[0].name("m", "/files", max_copies=2))["model_id"]
    assert (await pods[0].chat("m"))[0] == 200

    async def has_copies(num_copies: int, later_s: float) -> bool:
        await adjust(pods, later_s)
        return holders(pods, model_id) == num_copies

    for pod in pods:
        pod.runtime.switches.queued = 3
        pod.runtime.tell()
    await until_async(lambda: has_copies(2, QUEUED_S))
    for _ in range(3):
        await adjust(pods, QUEUED_S)
    record = pods[0].pod.registry.models.get(model_id)
    assert record is not None
    assert len(record.instance_ids) == 2, "the registration allows two"
    for pod in pods:
        pod.runtime.switches.queued = 0
        pod.runtime.tell()
    await until_async(lambda: has_copies(1, 0.0))


async def test_min_copies_are_loaded_and_idle_models_unloaded(pods: list[RunningPod]) -> None:
    kept = (await pods[0].name("kept", "/files", min_copies=2))["model_id"]
    idle = (await pods[0].name("idle", "/other", idle_timeout_s=1.5))["model_id"]
    assert (await pods[0].chat("idle"))[0] == 200
    assert holders(pods, idle) == 1
    await until(lambda: holders(pods, kept) == 2)
    await until(lambda: holders(pods, idle) == 0)
    assert holders(pods, kept) == 2


async def test_load_asked_for_at_all_pods_at_once_is_done_once(pods: list[RunningPod]) -> None:
    await pods[0].register("m")
    for pod in pods:
        await pod.pod.registry.models.find("m")
        pod.runtime.switches.load_s = 0.3
    answers = await asyncio.gather(*(pod.echo("m") for pod in pods for _ in range(3)))
    assert answers == [b"hi"] * 9
    assert sum(pod.runtime.log.count(("load", "m")) for pod in pods) == 1


async def test_load_that_failed_is_tried_elsewhere_within_the_request(pods: list[RunningPod]) -> None:
    await pods[0].register("m", "/m")
    pods[0].runtime.switches.fail = {"/m": "the disk of this pod is broken"}
    pods[1].runtime.switches.fail = {"/m": "the disk of this pod is broken"}
    assert await asyncio.wait_for(pods[0].echo("m"), 20) == b"hi"
    assert "m" in pods[2].runtime.loaded


async def test_load_is_waited_for_at_the_pod_that_does_it(pods: list[RunningPod]) -> None:
    a, *others = pods
    a.runtime.switches.full_disk = True
    for name in ("x", "y"):  # failed loads put the pod last
        await a.register(name, f"/{name}")
        await a.pod.placement.ensure_loaded(name, wait=True, local_only=True)
    gate = asyncio.Event()
    for pod in others:
        pod.runtime.switches.load_gate = gate
    await a.register("m")
    answer = asyncio.ensure_future(a.echo("m"))
    # Only the pod that holds the request knows that it must not evict the model before the request has been answered.
    await until(lambda: any(pod.pod.copies.num_waiting("m") for pod in others))
    assert not a.pod.copies.num_waiting("m")
    gate.set()
    assert await answer == b"hi"
    assert sum(pod.runtime.log.count(("load", "m")) for pod in pods) == 1


async def test_load_that_cannot_succeed_is_tried_three_times(pods: list[RunningPod]) -> None:
    await pods[0].register("m", "/m")
    for pod in pods:
        pod.runtime.switches.fail = {"/m": "broken model"}
        await pod.pod.registry.models.find("m")
    for _ in range(5):
        for pod in pods:
            with pytest.raises(grpc.aio.AioRpcError, match="broken model"):
                await pod.echo("m")
    assert sum(pod.runtime.log.count(("load", "m")) for pod in pods) == 3


async def test_placement_prefers_pods_whose_loads_succeed(pods: list[RunningPod]) -> None:
    bad = pods[0].runtime
    bad.switches.fail = {f"/{number}": "no space left on device" for number in range(10)}
    for number in range(10):
        await pods[0].register(f"m{number}", f"/{number}")
        assert await asyncio.wait_for(pods[0].echo(f"m{number}"), 20) == b"hi"
        await asyncio.sleep(0.3)  # records are published at most every 0.1 s
    assert sum(verb == "load" for verb, _ in bad.log) <= 3


async def test_copies_of_a_pod_that_leaves_are_handed_over(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with running_pod(tmp_path / "b", store=store) as b:
        async with running_pod(tmp_path / "a", store=store) as a:
            await until(lambda: len(a.pod.registry.instances.live()) == 2)
            await a.register("m")
            await a.pod.placement.ensure_loaded("m", wait=True, local_only=True)
        await until(lambda: "m" in b.runtime.loaded, 5)


async def test_drain_is_called_off_for_a_running_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.placement.admission._SPARE_BUSY_S", 0.2)
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=15 * MB), grace_s=0.5) as pod:
        for name in ("a", "b"):
            await pod.register(name)
        stream = pod.method("Slow")(metadata=(("mm-model-id", "a"),))
        await stream.write(b"x")
        assert await stream.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pod.echo("b", timeout=1.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # no request waits for b any more: a stays and takes requests again
        assert await asyncio.wait_for(pod.echo("a"), 5) == b"hi"
        assert not stream.done()
        record = pod.pod.registry.models.get("a")
        assert record is not None
        await until(lambda: "pod" in (pod.pod.registry.models.get("a") or record).instance_ids)
        stream.cancel()
        # and now there is room
        assert await asyncio.wait_for(pod.echo("b"), 10) == b"hi"


async def test_eviction_keeps_pinned_models_and_begins_with_lower_priorities(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=35 * MB)) as pod:
        ids = {}
        for name, settings in (("pinned", {"pinned": True}), ("high", {"priority": 5}), ("low", {"priority": -5})):
            ids[name] = (await pod.name(name, "/files", **settings))["model_id"]
            assert (await pod.chat(name))[0] == 200
        for _ in range(3):
            assert (await pod.chat("low"))[0] == 200
        for number in range(2):
            await pod.name(f"new{number}", f"/new{number}")
            assert (await pod.chat(f"new{number}"))[0] == 200
        assert ids["pinned"] in pod.runtime.loaded
        assert ids["high"] in pod.runtime.loaded
        assert ids["low"] not in pod.runtime.loaded


async def test_copies_are_added_in_another_zone(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    zones = {"a": "east", "b": "east", "c": "west"}
    async with AsyncExitStack() as stack:
        pods = {
            name: await stack.enter_async_context(running_pod(tmp_path / name, store=store, zone=zone))
            for name, zone in zones.items()
        }
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 3 for pod in pods.values()))
        for number in range(4):
            model_id = f"m{number}"
            await pods["a"].register(model_id)
            await pods["a"].pod.placement.ensure_loaded(model_id, wait=True, local_only=True)
            await pods["a"].pod.placement.ensure_loaded(model_id, wait=True, avoid=frozenset({"a"}))
        assert set(pods["c"].runtime.loaded) == {"m0", "m1", "m2", "m3"}
        assert not pods["b"].runtime.loaded
