"""Two pods with an Envoy each, over a real etcd: calls go to the copy of the other pod, and back to the mesh if that has none."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.access.peer_keys import HOP_HEADER, PEER_KEY_HEADER
from mesh.envoy.routes import PEER_HEADER
from tests.support.envoy import num_through_mesh, running_envoy_pod, until_carried
from tests.support.etcd import EtcdServer
from tests.support.mesh_process import freeze
from tests.support.pods import RunningPod
from tests.support.tls import Authority, peer_settings
from tests.support.waiting import until, until_async

Pods = tuple[RunningPod, RunningPod]


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[Pods]:
    """Two pods, of which the second has the model."""
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_envoy_pod(tmp_path / "a", store=store) as a,
        running_envoy_pod(tmp_path / "b", store=store) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await b.register("m")
        await b.pod.placement.ensure_loaded("m", wait=True, local_only=True)
        await until_carried(a, "m")
        yield a, b


async def test_envoy_carries_calls_to_another_pods_copy(pods: Pods) -> None:
    a, b = pods
    before = [await num_through_mesh(pod, "m") for pod in pods]
    assert await a.echo("m") == b"hi"
    assert (await a.chat("m"))[0] == 200
    assert [await num_through_mesh(pod, "m") for pod in pods] == before, "from Envoy to Envoy to the runtime"
    assert a.runtime.calls["m"] == 0
    assert not {HOP_HEADER, PEER_KEY_HEADER} & {name.lower() for name in b.runtime.headers[-1]}
    assert not {HOP_HEADER, PEER_KEY_HEADER} & {name for name, _ in b.runtime.metadata[-1]}
    await until(lambda: a.pod.copies.uses.of("m") > 2)
    assert a.pod.copies.in_flight("m") == 0


async def test_call_comes_back_from_a_pod_that_lost_the_model(pods: Pods) -> None:
    """The other pod may not wait for a load or send the call on: the pod that its caller chose loads the model, or finds it."""
    a, b = pods
    del b.runtime.loaded["m"]
    b.runtime.switches.fail["/m"] = "the disk of this pod is broken"
    assert await a.echo("m") == b"hi"
    assert a.runtime.calls["m"] == 1


async def test_envoy_lets_only_peers_reach_the_clusters_of_peers(pods: Pods) -> None:
    _, b = pods
    before = await num_through_mesh(b, "m")
    for extra in ((PEER_KEY_HEADER, "guessed"), (PEER_HEADER, "1")):
        await b.unary("/test.Any/Echo")(b"hi", metadata=(("mm-model-id", "m"), extra))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await b.unary("/test.Any/Echo")(b"hi", metadata=(("mm-model-id", "-peers/m"),))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert await num_through_mesh(b, "m") == before + 1, (
        "the guessed key is the mesh's to judge, the other call is a caller's"
    )


async def test_call_is_taken_from_a_pod_that_freezes(pods: Pods) -> None:
    """The connection of a stopped process stays open. Only pings that it does not answer show that it is one."""
    a, b = pods
    assert b.envoy is not None
    freeze(b.envoy)
    assert await a.echo("m", timeout=30) == b"hi"
    assert a.runtime.calls["m"] == 1


async def test_local_copy_comes_before_another_pods(pods: Pods) -> None:
    a, b = pods
    await a.pod.placement.ensure_loaded("m", wait=True, local_only=True)

    async def reaches_own_copy() -> bool:
        before = a.runtime.calls["m"], await num_through_mesh(a, "m")
        await a.echo("m")
        await a.chat("m")
        return (a.runtime.calls["m"], await num_through_mesh(a, "m")) == (before[0] + 2, before[1])

    await until_async(reaches_own_copy)
    before = b.runtime.calls["m"]
    for _ in range(5):
        await a.echo("m")
        await a.chat("m")
    assert b.runtime.calls["m"] == before


async def test_envoy_reaches_peers_over_mutual_tls(tmp_path: Path, etcd: EtcdServer) -> None:
    authority, store = Authority("mesh"), f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_envoy_pod(tmp_path / "a", store=store, **peer_settings(tmp_path / "tls-a", authority)) as a,
        running_envoy_pod(tmp_path / "b", store=store, **peer_settings(tmp_path / "tls-b", authority)) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        await b.register("m")
        await b.pod.placement.ensure_loaded("m", wait=True, local_only=True)
        await until_carried(a, "m")
        before = b.runtime.calls["m"]
        assert await a.echo("m") == b"hi"
        assert (await a.chat("m"))[0] == 200
        assert b.runtime.calls["m"] == before + 2
        assert PEER_KEY_HEADER not in dict(b.runtime.metadata[-1]), "the certificate is enough"
