"""A pod whose callers two workers serve, over a fake runtime: what they carry, what they pass on, and how they leave."""

import asyncio
import json
import socket
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.access.api_keys import digest_of
from mesh.config.schema import MeshConfig
from mesh.errors import InvalidRequest
from mesh.pod.pod import Pod
from mesh.pod.worker_process import RunningWorker
from mesh.workers.link import Link
from mesh.workers.messages import ToControl
from tests.support.envoy import bearer, num_through_mesh, until_carried
from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, load_at_the_other
from tests.support.waiting import until, until_async
from tests.support.workers import running_worker_pod, start_worker_here
from wire.fmaas import generation_pb2 as fmaas

FOR_M = (("mm-model-id", "m"),)


class SilentSecond:
    """Starts workers, of which the second stays silent until it is killed."""

    def __init__(self) -> None:
        self._num_started = 0

    async def start(self) -> RunningWorker:
        self._num_started += 1
        if self._num_started != 2:
            return await start_worker_here()
        ours, theirs = socket.socketpair()
        killed = asyncio.Event()

        async def wait() -> int:
            await killed.wait()
            return -9

        def kill() -> None:
            theirs.close()
            killed.set()

        return RunningWorker(await Link.over(ours, ToControl), kill, wait)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_worker_pod(tmp_path / "pod") as running:
        await running.register("m")
        await running.load("m")
        await until_carried(running, "m")
        yield running


async def test_worker_carries_calls_of_a_loaded_model(pod: RunningPod) -> None:
    before = await num_through_mesh(pod, "m")
    forged = (("authorization", "Bearer secret"), ("x-repertory-caller", "admin"), ("repertory-hop", "pod-b"))
    for header in ("mm-model-id", "mm-model-id-bin"):
        model = b"m" if header.endswith("-bin") else "m"
        assert await pod.unary("/test.Any/Echo")(b"hi", metadata=((header, model), *forged)) == b"hi"
    message = fmaas.BatchedGenerationRequest(model_id="m").SerializeToString()
    await pod.unary("/fmaas.GenerationService/Generate")(message)
    headers = {"Authorization": "Bearer secret", "x-repertory-caller": "admin", "X-Request-Id": "r1"}
    async with pod.http.post("/v1/completions", json={"model": "m"}, headers=headers) as answer:
        assert (await answer.json())["answer"] == "m"
        assert answer.headers["X-Request-Id"] == "r1"
    sent = [*pod.runtime.metadata[-3:], tuple(pod.runtime.headers[-1].items())]
    for metadata in sent:
        values = {name.lower(): value for name, value in metadata}
        assert not {"authorization", "repertory-hop"} & values.keys()
        assert values.get("x-repertory-caller", "") == ""
        assert values["mm-model-id"] == "m"
    assert await num_through_mesh(pod, "m") == before


async def test_worker_passes_unusual_calls_on(pod: RunningPod) -> None:
    echo = pod.unary("/test.Any/Echo")
    for extra in (("mm-required", "all"), ("repertory-peer-key", "guessed")):
        before = await num_through_mesh(pod, "m")
        await echo(b"hi", metadata=(*FOR_M, extra))
        assert await num_through_mesh(pod, "m") == before + 1, extra
        assert "repertory-peer-key" not in dict(pod.runtime.metadata[-1])
    for method in ("/mmesh.ModelRuntime/unloadModel", "/repertory.RuntimeState/watch"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pod.unary(method)(b"", metadata=FOR_M)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await echo(b"hi", metadata=(("mm-model-id", "unknown"),))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_worker_passes_bodies_of_any_length_on(pod: RunningPod) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for part in json.dumps({"name": "streamed", "uri": "/m"}):
            yield part.encode()

    headers = {"Content-Type": "application/json"}
    async with pod.http.post("/admin/v1/models", data=chunks(), headers=headers) as answer:
        assert answer.status == 200, await answer.text()
    async with pod.http.head("/health") as answer:
        assert answer.status == 200
    async with pod.http.post("/v1/completions", data=b"no JSON", headers=headers) as answer:
        assert answer.status == 400
    async with pod.http.get("/v1/models") as answer:
        assert {"m", "streamed"} <= {model["id"] for model in (await answer.json())["data"]}


async def test_worker_carries_what_a_key_allows(tmp_path: Path) -> None:
    keys = [
        {"name": "all", "sha256": digest_of("all"), "scopes": ["inference", "management", "metrics"]},
        {"name": "narrow", "sha256": digest_of("narrow"), "models": ["team/*"]},
        {"name": "manager", "sha256": digest_of("manager"), "scopes": ["management"]},
        {"name": "one", "sha256": digest_of("one"), "max_concurrent": 1},
        {"name": "slow", "sha256": digest_of("slow"), "requests_per_minute": 1},
    ]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": keys}))
    async with running_worker_pod(tmp_path / "pod", api_keys_file=str(file)) as pod:
        for name in ("team/a", "other"):
            body = {"name": name, "uri": "/m"}
            async with pod.http.post("/admin/v1/models", json=body, headers=bearer("all")) as answer:
                assert answer.status == 200
            await until_carried(pod, name, "all")

        async def outcome(model: str, secret: str) -> tuple[int, str, bool]:
            """Return the statuses of HTTP and gRPC, and whether both calls were carried."""
            before, code = await num_through_mesh(pod, model, "all"), "OK"
            calls = pod.runtime.calls.total()
            async with pod.http.post("/v1/completions", json={"model": model}, headers=bearer(secret)) as answer:
                status = answer.status
            metadata = (("mm-model-id", model), ("authorization", f"Bearer {secret}"))
            try:
                await pod.unary("/test.Any/Echo")(b"hi", metadata=metadata)
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            return (
                status,
                code,
                calls < pod.runtime.calls.total() and await num_through_mesh(pod, model, "all") == before,
            )

        assert await outcome("other", "all") == (200, "OK", True)
        assert await outcome("other", "narrow") == (403, "PERMISSION_DENIED", False)
        assert (await outcome("other", "manager"))[:2] == (403, "PERMISSION_DENIED")
        assert (await outcome("other", "wrong"))[:2] == (401, "UNAUTHENTICATED")
        assert await outcome("other", "one") == (200, "OK", False)
        assert (await outcome("other", "slow"))[1] == "RESOURCE_EXHAUSTED", "both ports count"

        async def count(carrier: str) -> float:
            async with pod.http.get("/metrics", headers=bearer("all")) as answer:
                text = await answer.text()
            prefix = "repertory_mesh_key_requests_total{"
            ended = (f'carrier="{carrier}",code="OK",key="narrow"', f'carrier="{carrier}",code="200",key="narrow"')
            found = [
                line for line in text.splitlines() if line.startswith(prefix) and any(map(line.__contains__, ended))
            ]
            return sum(float(line.split()[-1]) for line in found)

        before = [await count("grpc"), await count("http")]
        assert await outcome("team/a", "narrow") == (200, "OK", True)

        async def are_counted() -> bool:
            return [await count("grpc"), await count("http")] == [before[0] + 1, before[1] + 1]

        await until_async(are_counted)


async def test_copies_with_a_limit_get_their_calls_from_the_mesh(tmp_path: Path) -> None:
    async with running_worker_pod(tmp_path / "pod", switches=Switches(max_concurrency=2)) as pod:
        await pod.register("m")
        await pod.load("m")
        held = [pod.method("Echo")(metadata=FOR_M) for _ in range(2)]
        for call in held:
            await call.write(b"1")
            assert await call.read() == b"1"
        waiting = asyncio.ensure_future(pod.echo("m"))
        await until(lambda: pod.pod.copies.num_waiting("m") == 1)
        held[0].cancel()
        assert await waiting == b"hi"
        held[1].cancel()


async def test_calls_that_a_mute_runtime_holds_go_to_the_mesh(tmp_path: Path) -> None:
    async with running_worker_pod(tmp_path / "pod", workers=1) as pod:
        await pod.register("m")
        await until_carried(pod, "m")
        pod.runtime.switches.mute = True
        calls = [asyncio.ensure_future(pod.echo("m")) for _ in range(3)]
        await until(lambda: pod.pod.copies.num_waiting("m") == 3)
        for call in calls:
            call.cancel()


async def test_calls_between_pods_pass_their_workers(tmp_path: Path, etcd: EtcdServer) -> None:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_worker_pod(tmp_path / "a", store=store) as a,
        running_worker_pod(tmp_path / "b", store=store) as b,
    ):
        await load_at_the_other(a, b, "m")
        assert await a.echo("m") == b"hi"
        assert (await a.chat("m"))[0] == 200
        assert (a.runtime.calls["m"], b.runtime.calls["m"]) == (0, 2)


async def test_leaving_pod_lets_carried_calls_end(pod: RunningPod) -> None:
    call = pod.method("Echo")(metadata=FOR_M)
    await call.write(b"1")
    assert await call.read() == b"1"
    stopping = asyncio.ensure_future(pod.pod.stop())
    await until(lambda: not pod.pod.is_ready())
    await call.write(b"2")
    assert await call.read() == b"2"
    assert not stopping.done()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await stopping


async def test_worker_that_cannot_be_started_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started: list[RunningWorker] = []
    refusals = [OSError("too many open files")]

    async def start() -> RunningWorker:
        if started and refusals:
            raise refusals.pop()
        started.append(await start_worker_here())
        return started[-1]

    async with running_worker_pod(tmp_path / "pod", workers=1, start_worker=start) as pod:
        started[0].kill()
        await until(lambda: len(started) == 2)
        await until(lambda: pod.pod.is_front_connected)
        assert "a worker cannot be started: too many open files" in caplog.text


async def test_pod_whose_worker_never_listens_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.pod.workers.START_S", 0.3)
    with pytest.raises(OSError, match="1 of 2 workers listen"):
        async with running_worker_pod(tmp_path / "pod", start_worker=SilentSecond().start):
            pass


async def test_worker_stops_carrying_the_calls_of_a_key_that_is_removed_or_limited(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    scopes = ["inference", "management", "metrics"]
    entries: dict[str, dict[str, object]] = {
        name: {"name": name, "sha256": digest_of(name), "scopes": scopes} for name in ("kept", "removed")
    }

    def write(*keys: dict[str, object]) -> None:
        file.with_suffix(".new").write_text(json.dumps({"keys": keys}))
        file.with_suffix(".new").rename(file)

    write(*entries.values())
    async with running_worker_pod(tmp_path / "pod", api_keys_file=str(file)) as pod:
        async with pod.http.post("/admin/v1/models", json={"name": "m", "uri": "/m"}, headers=bearer("kept")) as answer:
            assert answer.status == 200
        await until_carried(pod, "m", "removed")
        write({**entries["kept"], "requests_per_minute": 1000})

        async def status(secret: str) -> int:
            async with pod.http.post("/v1/completions", json={"model": "m"}, headers=bearer(secret)) as answer:
                return answer.status

        async def is_refused() -> bool:
            return await status("removed") == 401

        async def is_counted() -> bool:
            before = await num_through_mesh(pod, "m", "kept")
            assert await status("kept") == 200
            return await num_through_mesh(pod, "m", "kept") == before + 1

        await until_async(is_refused)
        await until_async(is_counted)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"envoy": "auto"}, "workers and envoy are both set"),
        ({"grpc_listen": "unix:/tmp/x.sock"}, "workers share a port"),
        ({"request_memory_bytes": 40_000_000, "workers": 2}, "set at least 50331648"),
    ],
)
def test_settings_that_workers_cannot_serve_are_refused(
    tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    config = MeshConfig(**{"store": str(tmp_path / "store"), "workers": 1, **settings})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=named):
        Pod(config)
