"""Runtimes and pods that freeze, fall silent or become slow: requests are answered elsewhere within seconds, over a real etcd."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from msgspec.structs import replace

from mesh.registry.records import InstanceRecord, encode_record
from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import FakeRuntime
from tests.support.mesh_process import MeshProcess, mesh_process
from tests.support.pods import RunningPod, running_pod
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import until, until_async
from wire.mmesh import model_mesh_pb2 as mm
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

pytestmark = pytest.mark.slow

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[tuple[RunningPod, RunningPod]]:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with running_pod(tmp_path / "a", store=store) as a, running_pod(tmp_path / "b", store=store) as b:
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        yield a, b
        for pod in (a, b):
            pod.runtime.switches.mute = False
            pod.runtime.thaw()


async def loaded_at(pod: RunningPod, other: RunningPod, model_id: str) -> None:
    """Load the model on `pod`, and return when `other` sees it."""
    await pod.pod.placement.ensure_loaded(model_id, wait=True, local_only=True)
    await until(
        lambda: any(
            copy.instance_id == pod.pod.instance_id and copy.model.state == "loaded"
            for copy in other.pod.states.status(model_id).copies
        )
    )


async def load_alone(pod: MeshProcess, model_id: str) -> None:
    """Register and load a model on a pod that has no peer yet."""
    await until_async(lambda: asyncio.to_thread(pod.is_ready), 60)
    request = mm.RegisterModelRequest(
        modelId=model_id, modelInfo=mm.ModelInfo(type="llm", path="/m"), loadNow=True, sync=True
    )
    async with grpc.aio.insecure_channel(pod.grpc_address) as channel:
        assert (await ModelMeshStub(channel).registerModel(request)).status == mm.ModelStatusInfo.LOADED


async def test_frozen_runtime_is_known_to_all_and_its_models_are_loaded_elsewhere(
    pods: tuple[RunningPod, RunningPod],
) -> None:
    a, b = pods
    await a.register("m")
    await loaded_at(b, a, "m")
    b.runtime.freeze()
    started_s = time.monotonic()
    through_a, through_b = asyncio.ensure_future(a.echo("m")), asyncio.ensure_future(b.echo("m"))
    assert await asyncio.wait_for(through_a, 15) == b"hi"
    assert await asyncio.wait_for(through_b, 15) == b"hi"
    assert time.monotonic() - started_s < 10
    record = a.pod.registry.instances.get("b")
    assert record is not None
    assert record.cannot_serve
    assert not b.pod.is_ready()
    assert "m" in a.runtime.loaded
    b.runtime.thaw()
    await until(b.pod.is_ready)
    await until(lambda: not (a.pod.registry.instances.get("b") or InstanceRecord(cannot_serve=True)).cannot_serve)


async def test_frozen_runtime_that_is_gone_is_left_alone(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.register("m")
    await loaded_at(b, a, "m")
    await b.runtime.stop()
    assert await asyncio.wait_for(a.echo("m"), 10) == b"hi"
    await until(lambda: not b.pod.is_ready())
    assert await asyncio.wait_for(b.echo("m"), 10) == b"hi"
    assert "m" in a.runtime.loaded


@pytest.mark.parametrize("carrier", ["grpc", "http"])
async def test_frozen_pod_costs_seconds_and_no_request(tmp_path: Path, etcd: EtcdServer, carrier: str) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    (tmp_path / "b").mkdir()
    runtime = FakeRuntime(tmp_path / "b")
    await runtime.start()
    with mesh_process(
        tmp_path, "b", store=store, runtime_grpc=runtime.grpc_address, runtime_http=runtime.http_address
    ) as b:
        await load_alone(b, "m")
        async with running_pod(tmp_path / "a", store=store) as a:
            await until(lambda: len(a.pod.registry.instances.live()) == 2)
            await until(lambda: a.pod.states.status("m").status.name == "LOADED")

            async def call() -> object:
                return await a.echo("m") if carrier == "grpc" else (await a.chat("m"))[0]

            assert await call() in (b"hi", 200)
            assert runtime.calls["m"] == 1
            b.freeze()
            started_s = time.monotonic()
            assert set(await asyncio.wait_for(asyncio.gather(*(call() for _ in range(5))), 20)) <= {b"hi", 200}
            assert time.monotonic() - started_s < 6
            assert "m" in a.runtime.loaded
            started_s = time.monotonic()
            assert await call() in (b"hi", 200)
            assert time.monotonic() - started_s < 1
            b.thaw()
            await until(lambda: a.pod.peer_health.is_usable("b"), 20)
    await runtime.stop()


async def test_frozen_pod_ends_its_streams_with_its_session(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    (tmp_path / "b").mkdir()
    runtime = FakeRuntime(tmp_path / "b")
    runtime.switches.chunk_s = 0.05
    await runtime.start()
    with mesh_process(
        tmp_path,
        "b",
        store=store,
        runtime_grpc=runtime.grpc_address,
        runtime_http=runtime.http_address,
        session_ttl_s=3.0,
    ) as b:
        await load_alone(b, "m")
        async with running_pod(tmp_path / "a", store=store, session_ttl_s=3.0) as a:
            await until(lambda: a.pod.states.status("m").status.name == "LOADED")
            body = {"model": "m", "stream": True, "chunks": 10_000}
            async with a.http.post("/v1/completions", json=body) as stream:
                await stream.content.readany()
                b.freeze()
                text = await asyncio.wait_for(stream.read(), 30)
            assert b"broke off" in text
            b.thaw()
    await runtime.stop()


@pytest.mark.parametrize("through", [0, 1])
async def test_mute_runtime_fails_no_request_and_is_avoided(pods: tuple[RunningPod, RunningPod], through: int) -> None:
    a, b = pods
    models = ("m0", "m1", "m2")
    for model in models:
        await a.register(model)
        await loaded_at(b, a, model)
    b.runtime.switches.mute = True
    answers = [asyncio.ensure_future(pods[through].echo(model)) for model in models]
    assert await asyncio.wait_for(asyncio.gather(*answers), 5) == [b"hi"] * 3
    assert not b.pod.is_ready()
    await until(lambda: (a.pod.registry.instances.get("b") or InstanceRecord()).cannot_serve)
    assert set(models) <= set(a.runtime.loaded)
    b.runtime.switches.mute = False
    b.runtime.tell()
    await until(b.pod.is_ready, 10)


@pytest.mark.parametrize("through", [0, 1])
async def test_requests_that_wait_for_a_load_on_a_frozen_runtime_are_answered_elsewhere(
    pods: tuple[RunningPod, RunningPod], through: int
) -> None:
    a, b = pods
    await a.register("m")
    gate = b.runtime.switches.load_gate = asyncio.Event()
    await b.pod.registry.models.find("m")
    begun = asyncio.ensure_future(b.pod.placement.ensure_loaded("m", wait=True, local_only=True))
    await until(lambda: "m" in b.runtime.loading)
    await until(lambda: bool((record := a.pod.registry.models.get("m")) and record.instance_ids))
    answer = asyncio.ensure_future(pods[through].echo("m"))
    await until(lambda: b.pod.copies.num_waiting("m") == 1)
    b.runtime.freeze()
    assert await asyncio.wait_for(answer, 12) == b"hi"
    assert "m" in a.runtime.loaded
    gate.set()
    b.runtime.thaw()
    await begun


async def test_mute_runtime_is_not_suspected_for_a_long_answer(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.register("m")
    await loaded_at(b, a, "m")
    b.runtime.switches.answer_s = 2.5
    assert await asyncio.gather(*(a.echo("m") for _ in range(4))) == [b"hi"] * 4
    assert b.runtime.calls["m"] == 4


async def test_slow_copy_loses_its_traffic_to_a_fast_one(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.register("m")
    await loaded_at(b, a, "m")
    await loaded_at(a, b, "m")
    a.runtime.switches.answer_s = 0.5
    for _ in range(10):
        assert await a.echo("m") == b"hi"
    assert a.runtime.calls["m"] <= 4
    assert b.runtime.calls["m"] >= 6


async def test_partitioned_pod_does_not_hold_a_request_for_long(tmp_path: Path, etcd: EtcdServer) -> None:
    root = uuid.uuid4().hex
    async with (
        running_pod(tmp_path / "a", store=f"{etcd.url}/{root}") as a,
        running_pod(tmp_path / "b", store=f"{etcd.url}/{root}") as b,
        tcp_proxy("127.0.0.1:1") as partition,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await a.register("m")
        await loaded_at(b, a, "m")
        record = b.pod.registry.instances.get("b")
        assert record is not None
        # the other pod is alive and in the store, and its address carries nothing
        partition.cut()
        unreachable = replace(record, grpc_address=partition.endpoint, http_address=partition.endpoint)
        await a.pod.store.put(f"/{root}/mm/repertory/instances/b", encode_record(unreachable))
        await until(lambda: (a.pod.registry.instances.get("b") or record).http_address == partition.endpoint)
        started_s = time.monotonic()
        assert await asyncio.wait_for(a.echo("m"), 20) == b"hi"
        assert time.monotonic() - started_s < 6
        assert "m" in a.runtime.loaded
