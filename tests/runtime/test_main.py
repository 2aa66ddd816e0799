"""`python -m runtime` with the real engine and a tiny real model: up, load, answer, lose the engine, end in order."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from common.exit_status import CANNOT_START
from runtime.__main__ import Runtime
from runtime.config.schema import EngineConfig, RuntimeConfig
from runtime.observability.metrics import RuntimeMetrics
from tests.support.engines import fake_command
from tests.support.llama_checkpoints import tiny_llama
from wire.mmesh import model_runtime_pb2 as spi
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeStub


def command(tmp_path: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "runtime",
        "--listen",
        f"unix:{tmp_path}/grpc.sock",
        "--http-listen",
        f"unix:{tmp_path}/http.sock",
        "--cache-dir",
        str(tmp_path / "cache"),
        "--model-roots",
        str(tmp_path),
        "--device",
        "cpu",
        "--device-budget",
        "64MiB",
        "--slab",
        "256KiB",
        "--num-threads",
        "1",
        "--grace",
        "20",
        *more,
    ]


@asynccontextmanager
async def running(
    tmp_path: Path,
) -> AsyncIterator[tuple[subprocess.Popen[bytes], ModelRuntimeStub, aiohttp.ClientSession, grpc.aio.Channel]]:
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.to_thread(subprocess.Popen, command(tmp_path), stderr=log)
    connector = aiohttp.UnixConnector(str(tmp_path / "http.sock"))
    try:
        async with (
            grpc.aio.insecure_channel(f"unix:{tmp_path}/grpc.sock") as channel,
            aiohttp.ClientSession("http://runtime", connector=connector) as session,
        ):
            stub = ModelRuntimeStub(channel)
            await ready(stub, process)
            yield process, stub, session, channel
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
            child.kill()
        process.kill()
        process.wait()


async def ready(stub: ModelRuntimeStub, process: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s and process.poll() is None:
        try:
            status = await stub.runtimeStatus(spi.RuntimeStatusRequest(), wait_for_ready=True, timeout=60)
            if status.status == spi.RuntimeStatusResponse.READY:
                return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        await asyncio.sleep(0.1)
    raise AssertionError("the runtime did not come up")


async def complete(session: aiohttp.ClientSession, model: str, max_tokens: int) -> tuple[int, Any]:
    body = {"model": model, "prompt": "hello", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    async with session.post("/v1/completions", json=body) as response:
        return response.status, await response.json()


async def stream(session: aiohttp.ClientSession, model: str, max_tokens: int, begun: asyncio.Event) -> list[Any]:
    body = {
        "model": model,
        "prompt": "hello",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    events: list[Any] = []
    async with session.post("/v1/completions", json=body) as response:
        async for line in response.content:
            begun.set()
            if line.startswith(b"data: "):
                data = line[6:].strip()
                events.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return events


async def test_main_serves_loses_its_engine_and_ends_in_order(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "tiny")
    async with running(tmp_path) as (process, stub, session, channel):
        for version in ("v1", "v1alpha"):
            assert await services(channel, version) >= {
                "mmesh.ModelRuntime",
                "repertory.RuntimeState",
                "fmaas.GenerationService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
            }
        health = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == serving
        listed = (await health.List(health_pb2.HealthListRequest())).statuses
        assert {"", "mmesh.ModelRuntime", "inference.GRPCInferenceService"} <= set(listed)
        assert {answer.status for answer in listed.values()} == {serving}

        assert (await complete(session, "tiny", 4))[0] == 404
        for model_id, key in (("tiny", "{}"), ("small", '{"quantize": "int8"}')):
            loaded = await stub.loadModel(
                spi.LoadModelRequest(modelId=model_id, modelPath=str(tmp_path / "tiny"), modelKey=key)
            )
            assert loaded.sizeInBytes > 0
            status, answer = await complete(session, model_id, 4)
            assert status == 200
            assert answer["usage"]["completion_tokens"] == 4
        _, before = await complete(session, "tiny", 8)

        # the engine dies under a stream: it ends with an error, and the models come back by themselves
        begun = asyncio.Event()
        dying = asyncio.create_task(stream(session, "tiny", 200, begun))
        await begun.wait()
        engine = next(child for child in psutil.Process(process.pid).children() if "runtime.engine" in child.cmdline())
        os.kill(engine.pid, signal.SIGKILL)
        loading = stub.loadModel(spi.LoadModelRequest(modelId="later", modelPath=str(tmp_path / "tiny"), modelKey="{}"))
        events = await dying
        assert "error" in events[-1] or "error" in events[-2]
        until_s = time.monotonic() + 90
        while (answer := await complete(session, "tiny", 8))[0] != 200 and time.monotonic() < until_s:
            assert answer[0] == 503
            await asyncio.sleep(0.2)
        assert answer[1]["choices"][0]["text"] == before["choices"][0]["text"]
        # a load that began without an engine has waited for the next one
        assert (await loading).sizeInBytes > 0

        # SIGTERM under a stream: it finishes, and the process leaves with 0
        begun = asyncio.Event()
        last = asyncio.create_task(stream(session, "tiny", 100, begun))
        await begun.wait()
        process.send_signal(signal.SIGTERM)
        events = await last
        assert events[-1] == "[DONE]"
        assert await asyncio.to_thread(process.wait, 60) == 0
    assert not (tmp_path / "grpc.sock").exists()
    assert not psutil.pid_exists(engine.pid)
    log = (tmp_path / "log").read_text()
    assert "hello" not in log


async def services(channel: grpc.aio.Channel, version: str) -> set[str]:
    method: grpc.aio.StreamStreamMultiCallable[Any, Any] = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    async for answer in method(iter([reflection_pb2.ServerReflectionRequest(list_services="")])):
        return {service.name for service in answer.list_services_response.service}
    raise AssertionError("no answer")


async def test_main_ends_when_the_task_that_reports_its_state_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def update(metrics: RuntimeMetrics, groups: object, names: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(RuntimeMetrics, "update", update)
    config = RuntimeConfig(
        listen=(f"unix:{tmp_path}/grpc.sock",),
        http_listen=f"unix:{tmp_path}/http.sock",
        cache_dir=str(tmp_path / "cache"),
        grace_s=1.0,
    )
    runtime = Runtime(config, [EngineConfig()], command=fake_command())
    thresholds = gc.get_threshold()
    try:
        async with asyncio.timeout(30):
            assert await runtime.run(asyncio.Event()) == 1
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
    assert "Runtime._watch failed, so this process ends: KeyError('lost')" in caplog.text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--device-budget", "512"), "the device budget of 512 bytes is less than one slab of 262144 bytes"),
        pytest.param(
            ("--device", "cuda"),
            "device cuda needs an NVIDIA GPU and its driver",
            marks=pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU"),
        ),
    ],
)
def test_main_says_once_why_the_engine_cannot_start(tmp_path: Path, flags: tuple[str, str], sentence: str) -> None:
    ended = subprocess.run(command(tmp_path, *flags), capture_output=True, text=True, timeout=120)
    assert ended.returncode == CANNOT_START
    assert ended.stderr.count(sentence) == 1
    assert "Traceback" not in ended.stderr


def test_main_reports_a_taken_address_in_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            command(tmp_path, "--listen", f"127.0.0.1:{port}"), capture_output=True, text=True, timeout=60
        )
    assert ended.returncode == 1
    assert ended.stderr.strip() == f"repertory runtime: 127.0.0.1:{port} cannot be listened on: Address already in use"
