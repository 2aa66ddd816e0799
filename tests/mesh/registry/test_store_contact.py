"""Pods that lose the store alone, together, or find it wiped, over a real etcd."""

import asyncio
import time
import uuid
from pathlib import Path

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.registry.mass_loss import is_mass_loss
from mesh.registry.store_contact import has_store_elsewhere
from tests.support.etcd import EtcdServer
from tests.support.pods import RunningPod, running_pod
from tests.support.tcp_proxy import tcp_proxy
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as mm

pytestmark = pytest.mark.slow

silences = st.floats(0, 1000)


@given(st.floats(0, 1000), st.lists(silences, min_size=1), st.floats(0.1, 100))
def test_store_contact_compares_durations_of_pods(own: float, others: list[float], margin: float) -> None:
    assert has_store_elsewhere(own, others, margin) == any(silence + margin < own for silence in others)
    assert not has_store_elsewhere(own, [], margin)
    assert has_store_elsewhere(own, [None], margin)
    assert has_store_elsewhere(own, [*others, None], margin) == has_store_elsewhere(own, others, margin)


@given(st.integers(0, 100), st.integers(0, 100), st.booleans())
def test_mass_loss_needs_more_than_half_of_the_records(known: int, missing: int, went_back: bool) -> None:
    missing = min(missing, known)
    if is_mass_loss(known, missing, went_back=went_back):
        assert missing > known / 2
        assert went_back or missing >= 10
    assert is_mass_loss(known, known, went_back=True) == (known > 0)


async def loaded_at(pod: RunningPod, model_id: str) -> None:
    await pod.pod.placement.ensure_loaded(model_id, wait=True, local_only=True)


async def test_pod_that_alone_lost_the_store_is_not_ready_and_refuses(tmp_path: Path, etcd: EtcdServer) -> None:
    root = uuid.uuid4().hex
    async with (
        tcp_proxy(etcd.endpoint) as proxy,
        running_pod(tmp_path / "a", store=f"etcd://{proxy.endpoint}/{root}", session_ttl_s=4.0) as a,
        running_pod(tmp_path / "b", store=f"{etcd.url}/{root}", session_ttl_s=4.0) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await a.register("m", "/old")
        await loaded_at(a, "m")
        proxy.cut()
        await until(lambda: a.pod.contact.is_cut_off, 30)
        assert not a.pod.is_ready()
        assert b.pod.is_ready()
        with pytest.raises(grpc.aio.AioRpcError, match="lost the registry's store") as caught:
            await a.echo("m")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # another pod changes what this one knew: it never serves the old files again
        await b.management.unregisterModel(mm.UnregisterModelRequest(modelId="m"))
        await b.register("m", "/new")
        proxy.mend()
        await until(a.pod.is_ready, 30)
        assert await a.echo("m") == b"hi"
        assert a.runtime.loaded.get("m", "/new") == "/new"
        assert "/new" in {a.runtime.loaded.get("m"), b.runtime.loaded.get("m")}


async def test_pods_that_all_lost_the_store_stay_ready_and_serve(tmp_path: Path, own_etcd: EtcdServer) -> None:
    async with (
        running_pod(tmp_path / "a", store=own_etcd.url, session_ttl_s=2.0) as a,
        running_pod(tmp_path / "b", store=own_etcd.url, session_ttl_s=2.0) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await a.register("m")
        await loaded_at(a, "m")
        own_etcd.kill()
        for pod in (a, b):
            await until(lambda pod=pod: not pod.pod.registry.instances.is_leased, 20)  # type: ignore[misc]
        give_up_s = time.monotonic() + 8.0
        while time.monotonic() < give_up_s:
            assert a.pod.is_ready()
            assert b.pod.is_ready()
            assert await a.echo("m") == b"hi"
            await asyncio.sleep(0.1)
        own_etcd.start()
        for pod in (a, b):
            await until(lambda pod=pod: pod.pod.registry.instances.is_leased, 20)  # type: ignore[misc]
            assert pod.pod.is_ready()


async def test_registry_answers_names_at_once_without_the_store(tmp_path: Path, own_etcd: EtcdServer) -> None:
    async with running_pod(tmp_path / "a", store=own_etcd.url) as a:
        await a.name("smol", "/files")
        own_etcd.kill()
        await until(lambda: not a.pod.store.is_answering)
        started_s = time.monotonic()
        assert (await a.model("smol"))["uri"] == "/files"
        assert (await a.chat("unknown"))[0] == 404
        async with a.http.get("/v1/models/smol") as answer:
            assert answer.status == 200
        status = await a.management.getModelStatus(mm.GetStatusRequest(modelId="unknown"))
        assert status.status == mm.ModelStatusInfo.NOT_FOUND
        assert time.monotonic() - started_s < 1.0
        stopping_s = time.monotonic()
        await a.pod.stop()
        assert time.monotonic() - stopping_s < 3.0, "a pod leaves without waiting for a store that does not answer"


async def test_table_of_a_wiped_store_keeps_records_and_refuses_changes(tmp_path: Path, own_etcd: EtcdServer) -> None:
    async with running_pod(tmp_path / "a", store=own_etcd.url, session_ttl_s=2.0) as a:
        for name in ("m", "n"):
            await a.register(name)
            await a.echo(name)
        own_etcd.wipe()
        own_etcd.start()
        await until(lambda: a.pod.registry.num_lost == 2, 30)
        for name in ("m", "n"):
            assert await a.echo(name) == b"hi"
        with pytest.raises(grpc.aio.AioRpcError, match="disappeared at once"):
            await a.register("other")
        async with a.http.get("/readyz") as answer:
            assert (await answer.json())["lost_records"] == 2
        assert set(a.runtime.loaded) == {"m", "n"}
        async with a.http.post("/admin/v1/registry/accept-loss") as answer:
            assert await answer.json() == {"dropped": 2}
        await until(lambda: not a.runtime.loaded)
        await a.register("other")
        assert await a.echo("other") == b"hi"


async def test_table_treats_a_deleted_prefix_as_a_mass_loss(tmp_path: Path, own_etcd: EtcdServer) -> None:
    async with running_pod(tmp_path / "a", store=own_etcd.url) as a:
        names = [f"m{number}" for number in range(12)]
        for name in names:
            await a.register(name)
        await a.echo("m0")
        await asyncio.to_thread(own_etcd.delete_prefix, "/mm/repertory/registry/")
        await until(lambda: a.pod.registry.num_lost == 12)
        assert await a.echo("m0") == b"hi"
        assert await a.echo("m1") == b"hi"


async def test_loads_do_not_wait_for_an_absent_store(tmp_path: Path, own_etcd: EtcdServer) -> None:
    async with (
        running_pod(tmp_path / "a", store=own_etcd.url) as a,
        running_pod(tmp_path / "b", store=own_etcd.url) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        for number in range(4):
            await a.register(f"m{number}")
        await until(lambda: all(b.pod.registry.models.get(f"m{number}") for number in range(4)))
        own_etcd.kill()
        for pod in (a, b):
            await until(lambda pod=pod: not pod.pod.store.is_answering)  # type: ignore[misc]
        started_s = time.monotonic()
        for number in range(4):
            assert await (a, b)[number % 2].echo(f"m{number}") == b"hi"
        assert time.monotonic() - started_s < 3.0
        own_etcd.start()
        for number in range(4):
            await until(lambda number=number: a.pod.registry.models.get(f"m{number}").instance_ids, 30)  # type: ignore[misc, union-attr]
