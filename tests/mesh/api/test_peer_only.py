"""Headers and services that only peers may use: any caller may send them, and they change nothing."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from common.clock import epoch_ms
from mesh.access.peer_keys import HOP_HEADER, PEER_KEY_HEADER, PeerKeys
from mesh.store.embedded import EmbeddedStore
from tests.support.etcd import EtcdServer
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until, until_async
from wire.repertory import runtime_pb2 as state

LATE_MS = 1 << 62


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.register("m")
        yield running


@pytest.mark.parametrize("key", ["", "guessed"])
async def test_hop_header_of_a_caller_is_ignored(pod: RunningPod, key: str) -> None:
    """A hop may not wait for a load; a caller's request does, whatever it says."""
    headers = {HOP_HEADER: "pod-x", PEER_KEY_HEADER: key}
    metadata = (("mm-model-id", "m"), *headers.items())
    assert await pod.unary("/test.Any/Echo")(b"hi", metadata=metadata) == b"hi"
    assert not {HOP_HEADER, PEER_KEY_HEADER} & {name for name, _ in pod.runtime.metadata[-1]}
    async with pod.http.post("/v1/completions", json={"model": "m"}, headers={**headers, "mm-model-id": "x"}) as answer:
        assert (answer.status, (await answer.json())["answer"]) == (200, "m")
    assert not {HOP_HEADER, PEER_KEY_HEADER} & {name.lower() for name in pod.runtime.headers[-1]}


async def test_last_used_of_a_caller_is_ignored(pod: RunningPod) -> None:
    body = {"model": "m", "last_used_ms": LATE_MS}
    async with pod.http.post("/models/load", json=body, headers={HOP_HEADER: "pod-x"}) as answer:
        assert answer.status == 200
    await until(lambda: "m" in pod.runtime.loaded)
    record = pod.pod.registry.models.get("m")
    assert record is not None
    assert record.last_used_ms <= epoch_ms()


async def test_last_used_of_a_peer_is_clipped_to_now(pod: RunningPod) -> None:
    body = {"model": "m", "last_used_ms": LATE_MS}
    async with pod.http.post("/models/load", json=body, headers=dict(pod.pod.access.peers.headers())) as answer:
        assert answer.status == 200
    await until(lambda: "m" in pod.runtime.loaded)
    copy = pod.pod.copies.get("m")
    assert copy is not None
    assert copy.last_used_ms <= epoch_ms()


@pytest.mark.parametrize(
    "method",
    [
        "repertory.RuntimeState/fit",
        "repertory.RuntimeState/watch",
        "repertory.Invented/call",
        "mmesh.ModelRuntime/unloadModel",
        "mmesh.ModelRuntime/runtimeStatus",
        "com.ibm.watson.modelmesh.ModelRuntime/runtimeStatus",
        "com.ibm.watson.tas.proto.TasServingRuntime/unloadModel",
    ],
)
async def test_services_of_the_runtime_are_refused_with_a_models_name(pod: RunningPod, method: str) -> None:
    await pod.load("m")
    log = list(pod.runtime.log)
    for path in (f"/{method}", f"//{method}"):
        for header in (("mm-model-id", "m"), ("mm-model-id-bin", b"m"), ("mm-vmodel-id", "m")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await pod.unary(path)(state.FitRequest().SerializeToString(), metadata=(header,))
            assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND), path
    assert pod.runtime.fits == []
    assert pod.runtime.log == log, "neither unloaded nor purged"
    assert "m" in pod.runtime.loaded


async def test_peer_keys_are_shared_and_survive_a_change(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    a, b = PeerKeys(store, "/key", "a"), PeerKeys(store, "/key", "b")
    await a.start()
    await b.start()
    (_, first), (_, same) = a.headers()[1], b.headers()[1]
    assert first == same
    assert len(first) >= 40
    await store.put("/key", b"another-secret")
    await a.start()
    (_, second) = a.headers()[1]
    assert second == "another-secret"
    assert all(a.recognises(key) for key in (first, second)), "pods learn of a change one after another"
    assert not any(a.recognises(key) for key in ("", "guess", second.upper(), "\udcff"))
    await store.close()


async def test_hop_succeeds_while_pods_have_different_keys(tmp_path: Path, etcd: EtcdServer) -> None:
    """Callers' keys are changed pod by pod, and a request meets both the old and the new ones on its way."""
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_pod(tmp_path / "a", store=store, api_keys=("new",)) as a,
        running_pod(tmp_path / "b", store=store, api_keys=("old",)) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        headers = {"Authorization": "Bearer new"}
        async with a.http.post("/admin/v1/models", json={"name": "smol", "uri": "/f"}, headers=headers) as answer:
            model_id = (await answer.json())["model_id"]
        await b.pod.registry.models.find(model_id)
        await b.pod.placement.ensure_loaded(model_id, wait=True, local_only=True)
        await until(lambda: any(copy.model.state == "loaded" for copy in a.pod.states.status(model_id).copies))
        async with a.http.post("/v1/completions", json={"model": "smol"}, headers=headers) as answer:
            assert answer.status == 200
        metadata = (("mm-model-id", "smol"), ("authorization", "Bearer new"))
        assert await a.unary("/test.Any/Echo")(b"hi", metadata=metadata) == b"hi"
        assert b.runtime.calls[model_id] == 2


async def test_changed_peer_key_is_followed(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        path = "/mm/repertory/peerKey"
        await pod.pod.store.put(path, b"changed")
        await until(lambda: pod.pod.access.peers.headers()[1][1] == "changed")
        await pod.pod.store.delete(path)

        async def is_restored() -> bool:
            entry = await pod.pod.store.get(path)
            return entry is not None and entry.value == b"changed"

        await until_async(is_restored)
