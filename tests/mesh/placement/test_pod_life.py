"""A pod and its runtime over time: the runtime that dies and comes back, contention for room, restarts, shutting down; foreign runtimes."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.errors import StoreError
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.record_updates import RecordUpdates
from mesh.pod.identity import default_instance_id
from tests.support.etcd import EtcdServer, free_port
from tests.support.fake_runtime import MB, FakeRuntime, Switches
from tests.support.pods import running_pod
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as mm


@pytest.mark.parametrize("foreign", [False, True])
async def test_runtime_that_died_has_its_models_again(tmp_path: Path, foreign: bool) -> None:
    async with running_pod(tmp_path / "pod", foreign=foreign) as pod:
        for name in ("a", "b"):
            await pod.register(name)
            await pod.echo(name)
        await pod.runtime.stop()
        await until(lambda: not pod.pod.is_ready())
        waiting = asyncio.ensure_future(pod.echo("a"))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await pod.runtime.restart_empty()
        assert await waiting == b"hi"
        await until(lambda: set(pod.runtime.loaded) == {"a", "b"})
        # the second process was asked for readiness before it was given anything
        assert [verb for verb, _ in pod.runtime.log] == ["purge", "load", "load", "purge", "load", "load"]


async def test_runtime_whose_connection_breaks_is_not_purged(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        await pod.register("a")
        await pod.echo("a")
        await pod.runtime.stop()
        await until(lambda: not pod.pod.is_ready())
        await pod.runtime.start()
        assert await pod.echo("a") == b"hi"
        assert pod.runtime.log == [("purge", ""), ("load", "a")]


async def test_pod_serves_over_a_foreign_runtime(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", foreign=True, switches=Switches(capacity_bytes=25 * MB)) as pod:
        for name in ("a", "b", "c"):
            await pod.register(name)
            assert await pod.echo(name) == b"hi"
        assert set(pod.runtime.loaded) == {"b", "c"}
        async with pod.http.post("/admin/v1/fit", json={"name": "a"}) as answer:
            assert answer.status == 501


async def test_pod_loads_models_again_after_a_crash_and_none_after_an_orderly_end(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        await pod.register("a")
        await pod.echo("a")
        record = pod.pod.registry.models.get("a")
        assert record is not None
        assert list(record.instance_ids) == ["pod"]
    async with running_pod(tmp_path / "pod") as pod:
        record = pod.pod.registry.models.get("a")
        assert record is not None
        assert record.instance_ids == {}
        assert record.last_used_ms > 0
        # as a crash would leave it
        await RecordUpdates(pod.pod.registry.models, pod.pod.instance_id, LearnedCopies(lambda: False)).loading(
            "a", record.info, started_ms=1, last_used_ms=2
        )
        pod.pod.reconciler.withdraw = _nothing  # type: ignore[method-assign]
    async with running_pod(tmp_path / "pod") as pod:
        await until(lambda: "a" in pod.runtime.loaded)


async def test_pod_that_is_started_again_forgets_its_failures(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(full_disk=True)) as pod:
        await pod.register("a")
        with pytest.raises(grpc.aio.AioRpcError, match="disk is full"):
            await pod.echo("a")
    async with running_pod(tmp_path / "pod") as pod:
        await until(lambda: (record := pod.pod.registry.models.get("a")) is not None and not record.failed_in)
        assert await pod.echo("a") == b"hi"


async def _nothing() -> None:
    pass


async def test_models_that_need_the_same_room_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.placement.admission._SPARE_BUSY_S", 0.2)
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=15 * MB, chunk_s=0.02)) as pod:
        for name in ("a", "b"):
            await pod.register(name)

        async def count(name: str) -> int:
            call = pod.server_stream("/test.Any/Count")(b"40", metadata=(("mm-model-id", name),))
            return len([message async for message in call])

        running = asyncio.ensure_future(count("a"))
        await until(lambda: "a" in pod.runtime.loaded)
        assert await count("b") == 40
        # the one in use was let finish before it had to leave
        assert await running == 40
        assert set(pod.runtime.loaded) == {"b"}
        answers = await asyncio.gather(*(pod.echo(name) for name in ("a", "b") * 20))
        assert answers == [b"hi"] * 40


async def test_load_refused_for_another_reason_costs_one_eviction_at_most(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=100 * MB)) as pod:
        for name in ("a", "b", "c", "d"):
            await pod.register(name, f"/{name}")
            await pod.echo(name)
        pod.runtime.switches.full_disk = True
        await pod.register("e", "/e")
        with pytest.raises(grpc.aio.AioRpcError, match="disk is full"):
            await pod.echo("e")
        assert set(pod.runtime.loaded) >= {"b", "c", "d"}


async def test_loads_evict_until_the_runtime_has_space(tmp_path: Path) -> None:
    switches = Switches(capacity_bytes=100 * MB, hidden_bytes=50 * MB, size_bytes={"/large": 20 * MB})
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        for name in ("a", "b", "c", "d", "e"):
            await pod.register(name, f"/{name}")
            await pod.echo(name)
        await pod.register("large", "/large")
        assert await pod.echo("large") == b"hi"
        assert set(pod.runtime.loaded) == {"c", "d", "e", "large"}


async def test_loads_evict_nothing_for_a_model_that_can_never_fit(tmp_path: Path) -> None:
    switches = Switches(capacity_bytes=30 * MB, predicted_bytes=10 * MB, size_bytes={"/huge": 31 * MB})
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        for name in ("a", "b"):
            await pod.register(name, f"/{name}")
            await pod.echo(name)
        await pod.register("huge", "/huge")
        with pytest.raises(grpc.aio.AioRpcError, match="exceed the capacity"):
            await pod.echo("huge")
        assert set(pod.runtime.loaded) == {"a", "b"}


async def test_quarantined_model_is_left_alone_until_it_is_asked_for_by_name(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", failure_expiry_s=0.1) as pod:
        await pod.register("bad")
        await pod.register("good")
        await pod.echo("bad")
        pod.runtime.switches.quarantined.add("bad")
        pod.runtime.drop("bad")
        await until(lambda: pod.pod.copies.get("bad") is None)
        for _ in range(2):
            # also after the pause that any other failure has
            await asyncio.sleep(0.15)
            with pytest.raises(grpc.aio.AioRpcError, match="quarantined") as caught:
                await pod.echo("bad")
            assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert pod.runtime.log.count(("load", "bad")) == 1
        assert ("unload", "bad") not in pod.runtime.log
        assert (await pod.model("bad"))["state"] == "quarantined"
        assert await pod.echo("good") == b"hi"
        async with pod.http.post("/models/load", json={"model": "bad"}) as answer:
            assert answer.status == 200
        assert await pod.echo("bad") == b"hi"


async def test_load_of_an_unused_model_displaces_none_in_use(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=15 * MB)) as pod:
        await pod.register("a")
        await pod.echo("a")
        request = mm.RegisterModelRequest(
            modelId="b", modelInfo=mm.ModelInfo(type="llm", path="/b"), loadNow=True, sync=True
        )
        assert (await pod.management.registerModel(request)).status == mm.ModelStatusInfo.NOT_LOADED
        assert set(pod.runtime.loaded) == {"a"}
        assert await pod.echo("b") == b"hi"
        assert set(pod.runtime.loaded) == {"b"}


async def test_unloading_ends_a_load_that_is_under_way(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        await pod.name("a", "/files")
        pod.runtime.switches.load_gate = asyncio.Event()
        await pod.http.post("/models/load", json={"model": "a"})
        await until(lambda: pod.runtime.loading)
        async with pod.http.post("/models/unload", json={"model": "a"}) as answer:
            assert answer.status == 200
        await until(lambda: not pod.runtime.loading)
        assert (await pod.model("a"))["status"] == "NOT_LOADED"
        pod.runtime.switches.load_gate.set()
        assert (await pod.chat("a"))[0] == 200


async def test_pod_that_ends_refuses_waiting_requests_at_once(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grace_s=30.0) as pod:
        await pod.name("a", "/files")
        pod.runtime.switches.load_gate = asyncio.Event()
        waiting = asyncio.create_task(pod.chat("a"))
        await until(lambda: pod.runtime.loading)
        stopping = asyncio.create_task(pod.pod.stop())
        status, body, headers = await waiting
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "shutting down" in body["error"]["message"]
        assert pod.runtime.loading  # it is not the load's end that let it go
        pod.runtime.switches.load_gate.set()
        await stopping


async def test_unregistering_unloads(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        model = await pod.name("a", "/files")
        await pod.echo("a")
        await pod.pod.registry.remove_name("a")
        await until(lambda: model["model_id"] not in pod.runtime.loaded)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pod.echo("a")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_pod_serves_known_models_while_the_store_is_away(tmp_path: Path, own_etcd: EtcdServer) -> None:
    async with running_pod(tmp_path / "pod", store=own_etcd.url) as pod:
        for name in ("a", "b"):
            await pod.register(name)
        await pod.echo("a")
        own_etcd.kill()
        assert await pod.echo("a") == b"hi"
        # a model that is not loaded is known too
        assert await pod.echo("b", timeout=30) == b"hi"
        own_etcd.start()


@contextlib.asynccontextmanager
async def _process(directory: Path, runtime: FakeRuntime, http_port: int, **settings: object):  # type: ignore[no-untyped-def]
    config = {
        "grpc_listen": f"127.0.0.1:{free_port()}",
        "http_listen": f"127.0.0.1:{http_port}",
        "store": f"embedded:{directory}/registry",
        "runtime_grpc": runtime.grpc_address,
        "runtime_http": runtime.http_address,
        "log_json": True,
        **settings,
    }
    file = directory / "mesh.json"
    file.write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mesh",
        "serve-mesh",
        "--config",
        str(file),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_sigterm_lets_streams_finish_and_the_log_has_no_prompt(tmp_path: Path) -> None:
    import aiohttp

    runtime = FakeRuntime(tmp_path, switches=Switches(chunk_s=0.05))
    await runtime.start()
    port = free_port()
    async with _process(tmp_path, runtime, port) as process, aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with http.get("/readyz") as answer:
                    if answer.status == 200:
                        break
            await asyncio.sleep(0.05)
        async with http.post("/admin/v1/models", json={"name": "m", "uri": "/m"}) as answer:
            assert answer.status == 200
        body = {"model": "m", "stream": True, "chunks": 20, "prompt": "my secret words"}
        async with http.post("/v1/completions", json=body, headers={"X-Request-Id": "r-1"}) as answer:
            await answer.content.readany()
            process.send_signal(signal.SIGTERM)
            text = (await answer.read()).decode()
        assert text.endswith("data: [DONE]\n\n")
        _, log = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 0
    await runtime.stop()
    assert b"secret words" not in log
    lines = [json.loads(line) for line in log.decode().splitlines()]
    assert any(
        line.get("request_id") == "r-1" and line["model"].startswith("m__") and line["code"] == "200" for line in lines
    )


async def test_pod_reports_a_taken_port_in_one_line(tmp_path: Path) -> None:
    runtime = FakeRuntime(tmp_path)
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with _process(tmp_path, runtime, port) as process:
        _, log = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1
        last = log.decode().strip().splitlines()[-1]
        assert last.startswith("repertory: HTTP address 127.0.0.1:")
        assert "Traceback" not in log.decode()
    server.close()


async def test_placement_unloads_idle_models_after_low_predictions(tmp_path: Path) -> None:
    switches = Switches(default_size_bytes=60 * MB, predicted_bytes=10 * MB, overcommits=True)
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        calls = []
        for model_id in ("a", "b"):
            await pod.register(model_id)
            calls.append(pod.method("Slow")(metadata=(("mm-model-id", model_id),)))
            await calls[-1].write(b"x")
            assert await calls[-1].read() == b"first"
        await pod.pod.reconciler.sweep()
        assert set(pod.runtime.loaded) == {"a", "b"}  # too much, and both in use
        for call in calls:
            call.cancel()
        await until(lambda: not pod.pod.copies.in_flight("a"))
        await pod.pod.reconciler.sweep()
        await until(lambda: set(pod.runtime.loaded) == {"b"})
        # and what is known now is no longer predicted: there is room for one of them only
        await pod.load("a")
        await until(lambda: set(pod.runtime.loaded) == {"a"})
        assert pod.pod.copies.usage().used_bytes == 60 * MB


async def test_runtime_that_cannot_be_used_is_asked_again_with_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(loading_concurrency=0), wait=False) as pod:
        await until(lambda: "maxLoadingConcurrency is 0" in caplog.text)
        await asyncio.sleep(1.0)
        assert len(pod.runtime.log) < 10, "it was asked in a loop"
        pod.runtime.switches.loading_concurrency = 1
        await until(pod.pod.is_ready)


def test_hosts_whose_names_end_alike_make_different_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    made = set()
    for host in (
        "ip-10-0-1-23.eu-central-1.compute.internal",
        "ip-10-0-1-24.eu-central-1.compute.internal",
        "node,1",
        "n",
    ):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        made |= {default_instance_id("0.0.0.0:8033"), default_instance_id("0.0.0.0:8034")}
        assert default_instance_id("0.0.0.0:8033") in made
    assert len(made) == 8
    assert not any("," in name or len(name) > 40 for name in made)


async def test_pod_that_stops_while_the_store_is_away_asks_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question takes seconds then, and a pod may hold hundreds of models."""
    asked = []

    async def away(_: RecordUpdates, model_id: str, **__: int) -> None:
        asked.append(model_id)
        raise StoreError("store: no etcd endpoint could be reached within 3.5 s")

    async with running_pod(tmp_path / "pod") as pod:
        for name in ("a", "b", "c"):
            await pod.register(name)
            await pod.echo(name)
        monkeypatch.setattr(RecordUpdates, "gone", away)
    assert len(asked) == 1
