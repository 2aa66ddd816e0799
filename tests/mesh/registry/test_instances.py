"""Two pods on one etcd: each sees what the other registers, who is there, and who does the housekeeping."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import pytest
from msgspec.structs import replace

from common.model_state import CopyState, ModelState, Tier
from mesh.registry.records import InstanceRecord, decode_record, encode_record
from mesh.registry.registration import model_info
from mesh.registry.registry import Registry
from mesh.store.etcd import EtcdStore
from mesh.store.location import EtcdLocation
from mesh.store.protocol import Lease, Store
from mesh.types import ModelInfo
from tests.support.etcd import EtcdServer
from tests.support.mesh_node import NOW_MS, running_node
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as pb


def registry_of(store: Store, instance_id: str) -> Registry:
    return Registry(
        store,
        root_prefix="/root",
        kv_prefix="mm",
        service_name="svc",
        instance_id=instance_id,
        session_ttl_s=2.0,
        default_owner="repertory",
    )


@pytest.fixture
async def stores(own_etcd: EtcdServer) -> AsyncIterator[tuple[Store, Store]]:
    both = (EtcdStore(EtcdLocation((own_etcd.endpoint,))), EtcdStore(EtcdLocation((own_etcd.endpoint,))))
    for store in both:
        await store.open()
    yield both
    for store in both:
        await store.close()


async def test_registry_of_all_pods_has_what_one_pod_registers(stores: tuple[Store, Store]) -> None:
    async with running_node(stores[0], instance_id="a") as a, running_node(stores[1], instance_id="b") as b:
        info = pb.ModelInfo(type="llm", path="/m")
        await a.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=info, loadNow=True, sync=True))
        # at once, before b's watch has reported it
        assert (await b.mesh.getModelStatus(pb.GetStatusRequest(modelId="m"))).status == pb.ModelStatusInfo.LOADED
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await b.mesh.registerModel(
                pb.RegisterModelRequest(modelId="m", modelInfo=pb.ModelInfo(type="llm", path="/other"))
            )
        assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
        await b.mesh.unregisterModel(pb.UnregisterModelRequest(modelId="m"))
        async with asyncio.timeout(10):
            await a.registry.models.table.until("m", lambda record: record is None)


async def test_registry_moves_a_vmodel_for_all_pods(stores: tuple[Store, Store]) -> None:
    async with running_node(stores[0], instance_id="a") as a, running_node(stores[1], instance_id="b") as b:
        first = pb.SetVModelRequest(
            vModelId="v", targetModelId="m1", modelInfo=pb.ModelInfo(type="llm", path="/1"), loadNow=True, sync=True
        )
        await a.mesh.setVModel(first)
        assert await b.registry.resolve_fresh("v") == "m1"
        second = pb.SetVModelRequest(
            vModelId="v", targetModelId="m2", modelInfo=pb.ModelInfo(type="llm", path="/2"), sync=True
        )
        assert (await b.mesh.setVModel(second)).activeModelId == "m2"
        async with asyncio.timeout(10):
            await a.registry.vmodels.table.until("v", lambda vmodel: vmodel is not None and vmodel.active_id == "m2")
        assert a.registry.resolve("v") == "m2"


async def test_registry_of_two_pods_agrees_on_a_name_registered_twice(stores: tuple[Store, Store]) -> None:
    async with running_node(stores[0], instance_id="a") as a, running_node(stores[1], instance_id="b") as b:
        calls = [
            node.mesh.setVModel(
                pb.SetVModelRequest(
                    vModelId="v", targetModelId=f"m{number}", modelInfo=pb.ModelInfo(type="llm", path="/m")
                )
            )
            for number in range(6)
            for node in (a, b)
        ]
        await asyncio.gather(*calls)
        vmodel = (await a.registry.vmodels.table.read("v")).record
        assert vmodel is not None
        for number in range(6):
            record = (await b.registry.models.table.read(f"m{number}")).record
            assert (record.refs if record else 0) == (f"m{number}" in (vmodel.active_id, vmodel.target_id))


async def test_instances_lists_live_pods_and_drops_a_dead_one(stores: tuple[Store, Store]) -> None:
    a, b = registry_of(stores[0], "a"), registry_of(stores[1], "b")
    async with AsyncExitStack() as stack:
        for registry in (a, b):
            await registry.start()
            stack.push_async_callback(registry.close)
        report = ModelState(tier=Tier.HOST, running=2)
        await a.instances.publish(InstanceRecord(start_time_ms=NOW_MS, grpc_address="h:1", copies={"m": report}))
        await b.instances.publish(InstanceRecord(start_time_ms=NOW_MS, grpc_address="h:2"))
        async with asyncio.timeout(10):
            await b.instances.table.until("a", lambda record: record is not None)
            await b.instances.table.until("b", lambda record: record is not None)
            await a.instances.table.until("b", lambda record: record is not None)
        seen = b.instances.get("a")
        assert seen is not None
        assert seen.copies["m"] == report
        await until(a.instances.is_leader)
        assert not b.instances.is_leader()
        await a.instances.publish(InstanceRecord(start_time_ms=NOW_MS, grpc_address="h:1", shutting_down=True))
        async with asyncio.timeout(10):
            await b.instances.table.until("a", lambda record: record is not None and record.shutting_down)
            assert [instance_id for instance_id, _ in b.instances.live()] == ["b"]
            # a dies, so its lease is not renewed
            await stores[0].close()
            await b.instances.table.until("a", lambda record: record is None)
        await until(b.instances.is_leader)


async def test_leader_latch_elects_the_oldest_candidate(stores: tuple[Store, Store]) -> None:
    """A Java pod that was there first leads, whatever the age of its own record, until its key is gone."""
    await stores[1].put("/root/mm/svc/leaderLatch/_java", b"")
    pod = registry_of(stores[0], "pod")
    await pod.start()
    await pod.instances.publish(InstanceRecord(start_time_ms=NOW_MS))
    await until(lambda: pod.instances.get("pod") is not None)
    assert not pod.instances.is_leader()
    await stores[1].put("/root/mm/svc/leaderLatch/_later", b"")
    await stores[1].delete("/root/mm/svc/leaderLatch/_java")
    await until(pod.instances.is_leader)
    await pod.close()
    assert [entry.key for entry in (await stores[1].get_prefix("/root/mm/svc/leaderLatch/")).entries] == [
        "/root/mm/svc/leaderLatch/_later"
    ]


async def test_registry_keys_are_those_of_modelmesh(stores: tuple[Store, Store]) -> None:
    registry = registry_of(stores[0], "pod")
    await registry.start()
    await registry.register_name("smol", smol(), now_ms=NOW_MS, is_loaded=lambda _: False)
    await registry.instances.publish(InstanceRecord(start_time_ms=NOW_MS))
    keys = [entry.key for entry in (await stores[1].get_prefix("")).entries]
    target = registry.resolve("smol")
    assert keys == [
        "/root/mm/svc/instances/pod",
        "/root/mm/svc/leaderLatch/_pod",
        f"/root/mm/svc/registry/{target}",
        "/root/mm/svc/vmodels/smol",
    ]
    leased = await stores[1].get("/root/mm/svc/instances/pod")
    assert leased is not None
    assert leased.lease_id != 0
    await registry.close()
    assert await stores[1].get("/root/mm/svc/instances/pod") is None
    assert await stores[1].get("/root/mm/svc/leaderLatch/_pod") is None


def smol() -> ModelInfo:
    return model_info("smol", "/m", {})


LOADING = InstanceRecord(start_time_ms=1, grpc_address="a:1", copies={"m": ModelState(state=CopyState.LOADING)})
LOADED = replace(LOADING, count=1, copies={"m": ModelState()})


async def test_changes_of_a_record_reach_other_pods(stores: tuple[Store, Store]) -> None:
    a, b = registry_of(stores[0], "a"), registry_of(stores[1], "b")
    await a.start()
    await b.start()
    try:
        await a.instances.publish(LOADING)
        await until(lambda: b.instances.get("a") is not None)
        heard: list[tuple[str, InstanceRecord | None]] = []
        b.instances.listen(lambda pod_id, _, new: heard.append((pod_id, new)))
        await a.instances.publish(LOADED, whole=False)
        await b.instances.refresh("a")
        seen = b.instances.get("a")
        assert seen is not None
        assert (seen.count, seen.copies) == (1, LOADED.copies)
        assert heard == [("a", seen)]
        assert b.instances.live() == b.instances.items() == [("a", seen)]
        assert (await stores[1].get_prefix("/root/mm/svc/instances/")).entries[0].mod_revision < (
            await stores[1].get_prefix("/root/mm/svc/instanceChanges/")
        ).revision
        # A pod that starts now reads the same from the two keys.
        c = registry_of(stores[1], "c")
        await c.start()
        assert c.instances.get("a") == seen
        await c.close()
        await a.instances.publish(replace(LOADED, shutting_down=True), whole=False)
        await until(lambda: b.instances.live() == [])
    finally:
        await a.close()
        await until(lambda: b.instances.items() == [])
        await b.close()


async def test_record_is_written_whole_while_a_pod_of_an_earlier_release_is_there(stores: tuple[Store, Store]) -> None:
    a = registry_of(stores[0], "a")
    await a.start()
    old = InstanceRecord(start_time_ms=2, grpc_address="old:1")
    await stores[1].put("/root/mm/svc/instances/old", encode_record(old))
    await until(lambda: a.instances.get("old") is not None)
    try:
        await a.instances.publish(LOADING)
        await a.instances.publish(LOADED, whole=False)
        entry = await stores[1].get("/root/mm/svc/instances/a")
        assert entry is not None
        assert decode_record(InstanceRecord, entry.value).copies == LOADED.copies
    finally:
        await a.close()


async def test_changed_record_is_put_again_after_a_lost_lease(stores: tuple[Store, Store]) -> None:
    a, b = registry_of(stores[0], "a"), registry_of(stores[1], "b")
    await a.start()
    await b.start()
    try:
        await a.instances.publish(LOADING)
        await a.instances.publish(LOADED, whole=False)
        await until(lambda: (seen := b.instances.get("a")) is not None and seen.count == 1)
        entry = await stores[1].get("/root/mm/svc/instances/a")
        assert entry is not None
        gone: list[str] = []
        b.instances.listen(lambda pod_id, _, new: gone.append(pod_id) if new is None else None)
        await stores[1].revoke(Lease(entry.lease_id, 2.0))
        await until(lambda: gone == ["a"] and b.instances.get("a") is not None)
        seen = b.instances.get("a")
        assert seen is not None
        assert (seen.count, seen.copies) == (1, LOADED.copies)
    finally:
        await a.close()
        await b.close()


async def test_deleted_keys_of_a_live_pod_come_back(stores: tuple[Store, Store]) -> None:
    """Someone deletes them with etcdctl. The lease lives on, and an idle pod has nothing else to write."""
    a, b = registry_of(stores[0], "a"), registry_of(stores[1], "b")
    await a.start()
    await b.start()
    try:
        await a.instances.publish(LOADING)
        await until(lambda: b.instances.get("a") is not None and a.instances.is_leader())
        for key in ("/root/mm/svc/instances/a", "/root/mm/svc/leaderLatch/_a"):
            assert await stores[1].delete(key)
        await until(lambda: a.instances.get("a") is None and not a.instances.is_leader())
        await until(lambda: b.instances.get("a") is not None and a.instances.is_leader())
    finally:
        await a.close()
        await until(lambda: b.instances.items() == [])
        await b.close()
    assert (await stores[1].get_prefix("/root/mm/svc/leaderLatch/")).entries == ()
