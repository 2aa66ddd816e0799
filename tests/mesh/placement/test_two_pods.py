"""Two pods over one real etcd, each with a fake runtime: they see each other's models and pass requests on in one hop."""

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest

from mesh.types import ModelStatus
from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until, until_async

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[tuple[RunningPod, RunningPod]]:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_pod(tmp_path / "a", store=store, keep_alive_s=0.1) as a,
        running_pod(tmp_path / "b", store=store, keep_alive_s=0.1) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        yield a, b


async def loaded_at(pod: RunningPod, other: RunningPod, model_id: str) -> None:
    """`pod` has it, and `other` knows."""
    await pod.pod.placement.ensure_loaded(model_id, wait=True, local_only=True)

    def known() -> bool:
        return any(
            pod.pod.instance_id in copy.instance_id and copy.model.state == "loaded"
            for copy in other.pod.states.status(model_id).copies
        )

    await until(known)


async def test_two_pods_forward_in_one_hop_to_the_pod_that_has_the_model(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.register("m")
    await loaded_at(b, a, "m")
    assert await a.echo("m", b"over there") == b"over there"
    assert (a.runtime.loaded, b.runtime.calls["m"]) == ({}, 1)
    seen = dict(b.runtime.metadata[-1])
    assert seen["mm-model-id"] == "m"
    assert not any(key.startswith("repertory") for key in seen)
    # streams, statuses and trailers pass the hop as well
    call = a.server_stream("/test.Any/Count")(b"20", metadata=FOR_M)
    assert [message async for message in call] == [str(index).encode() for index in range(20)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await a.unary("/test.Any/Fail")(b"ABORTED", metadata=FOR_M)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert dict(tuple(caught.value.trailing_metadata()))["why-bin"] == b"\x00\xff"


async def test_http_goes_in_one_hop_too_and_cancelling_crosses_it(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    model_id = (await a.name("smol", "/files"))["model_id"]
    await b.pod.registry.models.find(model_id)
    await loaded_at(b, a, model_id)
    status, body, headers = await a.chat("smol")
    assert (status, body["answer"]) == (200, model_id)
    assert headers["X-Request-Id"] == body["id"]
    b.runtime.switches.chunk_s = 0.05
    answer = await a.http.post("/v1/completions", json={"model": "smol", "stream": True, "chunks": 1000})
    await answer.content.readany()
    answer.close()
    await until(lambda: b.runtime.cancelled == [model_id])
    assert a.runtime.loaded == {}


async def test_two_pods_serve_at_once_what_the_other_registers(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.name("smol", "/files")
    assert (await b.chat("smol"))[0] == 200
    async with b.http.get("/v1/models") as answer:
        assert [entry["id"] for entry in (await answer.json())["data"]] == ["smol"]


async def test_two_pods_wait_for_a_load_elsewhere_with_its_progress(
    pods: tuple[RunningPod, RunningPod],
) -> None:
    a, b = pods
    model_id = (await a.name("smol", "/files"))["model_id"]
    await b.pod.registry.models.find(model_id)
    gate = b.runtime.switches.load_gate = asyncio.Event()
    b.runtime.switches.progress = 0.3
    await b.pod.placement.ensure_loaded(model_id, local_only=True)
    await until(lambda: b.runtime.loading)
    record = await a.pod.registry.models.find(model_id)
    assert record is not None
    await until(lambda: "b" in (a.pod.registry.models.get(model_id) or record).instance_ids)
    async with a.http.post("/v1/completions", json={"model": "smol", "stream": True}) as answer:
        seen = b""
        while b"30 %" not in seen:
            seen += await asyncio.wait_for(answer.content.readany(), 10)
        gate.set()
        text = (seen + await answer.read()).decode()
    assert [json.loads(line[6:])["n"] for line in text.splitlines() if line.startswith("data: {")] == [0, 1, 2]
    assert a.runtime.log.count(("load", model_id)) == 0


async def test_last_use_is_the_same_on_every_pod(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    model_id = (await a.name("smol", "/files"))["model_id"]
    await b.pod.registry.models.find(model_id)
    await loaded_at(b, a, model_id)
    assert (await b.chat("smol"))[0] == 200
    used_ms = (await b.model("smol"))["last_used_ms"]
    assert used_ms > 0

    async def a_knows() -> bool:
        return bool((await a.model("smol"))["last_used_ms"] == used_ms)

    await until_async(a_knows)


async def test_two_pods_do_not_ask_twice_where_the_model_was_lost(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await a.register("m")
    await loaded_at(b, a, "m")
    # its books say otherwise than its record, as in the moment of an eviction
    copy = b.pod.copies.get("m")
    assert copy is not None
    copy.is_announced = False
    b.pod.copies.remove(copy)
    assert await a.echo("m") == b"hi"


async def test_two_pods_replace_one_that_dies_within_the_request(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with running_pod(tmp_path / "a", store=store) as a, running_pod(tmp_path / "b", store=store) as b:
        await until(lambda: len(a.pod.registry.instances.live()) == 2)
        await a.register("m")
        await loaded_at(b, a, "m")
        # its ports close, its record stays: as when the machine is gone
        await b.pod.grpc.stop(0)
        await b.pod.http.stop()
        assert await asyncio.wait_for(a.echo("m"), 20) == b"hi"
        assert "m" in a.runtime.loaded


async def test_two_pods_load_on_the_empty_one(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    small = Switches(capacity_bytes=15 * MB)
    async with (
        running_pod(tmp_path / "a", store=store, switches=small) as a,
        running_pod(tmp_path / "b", store=store) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await until(lambda: all(record.capacity_units for _, record in a.pod.registry.instances.live()))
        for name in ("m", "n"):
            await a.register(name)
        assert await a.echo("m") == b"hi"
        assert await a.echo("n") == b"hi"
        assert (set(a.runtime.loaded), set(b.runtime.loaded)) == ({"m"}, {"n"})
        # unloading at either pod reaches the copy
        await a.pod.placement.unload("n")
        assert b.runtime.loaded == {}


async def test_two_pods_keep_no_records_of_one_that_stopped(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with running_pod(tmp_path / "a", store=store) as a:
        async with running_pod(tmp_path / "b", store=store) as b:
            await a.register("m")
            await loaded_at(b, a, "m")
        await until(lambda: len(a.pod.registry.instances.live()) == 1)
        record = a.pod.registry.models.get("m")
        assert record is not None
        # The pod that stops may have had the other one load the model.
        await until(lambda: "b" not in (a.pod.registry.models.get("m") or record).instance_ids)
        assert await a.echo("m") == b"hi"


async def test_keys_are_shared_over_the_hop(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_pod(tmp_path / "a", store=store, api_keys=("k",)) as a,
        running_pod(tmp_path / "b", store=store, api_keys=("k",)) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        headers = {"Authorization": "Bearer k"}
        async with a.http.post("/admin/v1/models", json={"name": "smol", "uri": "/f"}, headers=headers) as answer:
            model_id = (await answer.json())["model_id"]
        await b.pod.registry.models.find(model_id)
        await loaded_at(b, a, model_id)
        async with a.http.post("/v1/completions", json={"model": "smol"}, headers=headers) as answer:
            assert answer.status == 200
        assert "Authorization" not in b.runtime.headers[-1]
        assert isinstance(a.http, aiohttp.ClientSession)
        metadata = (("mm-model-id", model_id), ("authorization", "Bearer k"))
        assert await a.unary("/test.Any/Echo")(b"hi", metadata=metadata) == b"hi"


async def test_two_pods_with_one_id_are_reported(
    pods: tuple[RunningPod, RunningPod], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = pods
    async with running_pod(tmp_path / "c", store=a.store, instance_id="a", wait=False):
        assert f"instance_id a is also that of a pod at 127.0.0.1:{a.pod.grpc.port}" in caplog.text


async def test_two_pods_list_the_whole_mesh(pods: tuple[RunningPod, RunningPod]) -> None:
    """As ModelMesh's leader does: a dashboard's sum over the pods counts each model once."""
    await pods[0].register("m")
    await until(lambda: all(pod.pod.registry.models.get("m") is not None for pod in pods))
    told = []
    for pod in pods:
        async with pod.http.get("/metrics") as answer:
            text = await answer.text()
        told += re.findall(r"^modelmesh_models_managed_total (\S+)$", text, re.MULTILINE)
        families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
        assert len(set(families)) == len(families), "one is reported twice"
    assert told == ["1.0"]


async def test_two_pods_load_an_adapter_where_its_base_is_or_fits(tmp_path: Path, etcd: EtcdServer) -> None:
    """The pod that is called has room for the adapters, not for their base, whose size is known from its first load."""
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    sizes = {"/base": 40 * MB, "/sql": MB, "/legal": MB}
    small = Switches(capacity_bytes=30 * MB, size_bytes=sizes)
    async with (
        running_pod(tmp_path / "a", store=store, switches=small) as a,
        running_pod(tmp_path / "b", store=store, switches=Switches(size_bytes=sizes)) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await until(lambda: all(record.capacity_units for _, record in a.pod.registry.instances.live()))
        ids = {}
        of_base = {"adapter_of": "base"}
        for name, settings in (("base", dict[str, str]()), ("sql", of_base), ("legal", of_base)):
            ids[name] = (await a.name(name, f"/{name}", **settings))["model_id"]
        assert (await a.chat("base"))[0] == 200
        assert (await a.chat("sql"))[1]["answer"] == ids["sql"]
        assert (set(a.runtime.loaded), set(b.runtime.loaded)) == (set(), {ids["base"], ids["sql"]})
        await b.pod.placement.unload(ids["base"])
        await until(lambda: not b.runtime.loaded)
        assert (await a.chat("legal"))[1]["answer"] == ids["legal"]
        assert (set(a.runtime.loaded), set(b.runtime.loaded)) == (set(), {ids["base"], ids["legal"]})
        records = [a.pod.registry.models.get(model_id) for model_id in ids.values()]
        assert [record.failed_in for record in records if record is not None] == [{}, {}, {}], "no pod tried in vain"


async def test_two_pods_answer_a_stream_that_waited_at_a_pod_whose_runtime_then_refuses(
    pods: tuple[RunningPod, RunningPod],
) -> None:
    """The comments come from the pod that the client called, so that the response of the other one has not begun."""
    a, b = pods
    await a.register("m")
    gate = b.runtime.switches.load_gate = asyncio.Event()
    b.runtime.switches.unavailable = 1000
    await b.pod.placement.ensure_loaded("m", local_only=True)
    await until(lambda: a.pod.states.status("m").status is ModelStatus.LOADING)
    async with a.http.post("/v1/completions", json={"model": "m", "stream": True}) as answer:
        seen = b""
        while seen.count(b"\n\n") < 5:  # the other pod would have begun to send its own
            seen += await answer.content.readany()
        assert seen.startswith(b": ")
        gate.set()
        text = (seen + await answer.read()).decode()
    assert b.runtime.refusals
    assert "error" not in text
    assert text.endswith("data: [DONE]\n\n")
    assert a.runtime.calls["m"] == 1
