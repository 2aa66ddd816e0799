"""A pod of the mesh in this process, over a fake runtime, with clients for its two ports."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import msgspec
import pytest

from mesh.config.schema import MeshConfig
from mesh.pod.pod import Pod
from mesh.pod.worker_process import start_worker_process
from mesh.pod.workers import StartWorker
from tests.support.fake_runtime import FakeRuntime, Switches
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as mm
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub


@dataclass
class RunningPod:
    pod: Pod
    runtime: FakeRuntime
    channel: grpc.aio.Channel
    http: aiohttp.ClientSession
    store: str
    envoy_dir: Path | None = None
    envoy: "subprocess.Popen[bytes] | None" = None

    @property
    def management(self) -> ModelMeshStub:
        return ModelMeshStub(self.channel)

    async def register(self, model_id: str, path: str = "/m") -> None:
        info = mm.ModelInfo(type="llm", path=path)
        await self.management.registerModel(mm.RegisterModelRequest(modelId=model_id, modelInfo=info))

    async def load(self, model_id: str) -> mm.ModelStatusInfo:
        return await self.management.ensureLoaded(mm.EnsureLoadedRequest(modelId=model_id, sync=True))

    async def name(self, name: str, uri: str, **settings: Any) -> dict[str, Any]:
        async with self.http.post("/admin/v1/models", json={"name": name, "uri": uri, **settings}) as answer:
            body: dict[str, Any] = await answer.json()
            assert answer.status == 200, body
            return body

    async def model(self, name: str) -> dict[str, Any]:
        async with self.http.get(f"/admin/v1/models/{name}") as answer:
            body: dict[str, Any] = await answer.json()
            return body

    def unary(self, method: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        return self.channel.unary_unary(method)

    def server_stream(self, method: str) -> grpc.aio.UnaryStreamMultiCallable[bytes, bytes]:
        return self.channel.unary_stream(method)

    def method(self, verb: str) -> grpc.aio.StreamStreamMultiCallable[bytes, bytes]:
        return self.channel.stream_stream(f"/test.Any/{verb}")

    async def echo(self, model_id: str, message: bytes = b"hi", **options: Any) -> bytes:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary("/test.Any/Echo")
        return await call(message, metadata=(("mm-model-id", model_id),), **options)

    async def chat(self, model: str, **body: Any) -> tuple[int, dict[str, Any], Any]:
        async with self.http.post("/v1/chat/completions", json={"model": model, **body}) as answer:
            return answer.status, await answer.json(), answer.headers


# `trusted`: the authority that the clients trust, for a pod that serves TLS.
@asynccontextmanager
async def running_pod(
    directory: Path,
    *,
    store: str = "",
    switches: Switches | None = None,
    foreign: bool = False,
    wait: bool = True,
    trusted: Path | None = None,
    start_worker: StartWorker = start_worker_process,
    **settings: Any,
) -> AsyncIterator[RunningPod]:
    directory.mkdir(parents=True, exist_ok=True)
    runtime = FakeRuntime(directory, foreign=foreign, switches=switches)
    await runtime.start()
    config = MeshConfig(
        **{
            "grpc_listen": "127.0.0.1:0",
            "http_listen": "127.0.0.1:0",
            "store": store or f"embedded:{directory}/registry",
            "runtime_grpc": runtime.grpc_address,
            "grace_s": 2.0,
            "runtime_http": runtime.http_address,
            **settings,
        }
    )
    config = msgspec.structs.replace(config, instance_id=settings.get("instance_id") or directory.name)
    pod = Pod(config, start_worker=start_worker)
    await pod.start()
    ports = pod.ports
    options = (("grpc.max_receive_message_length", 64 * 1024 * 1024), ("grpc.use_local_subchannel_pool", 1))
    if trusted is None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}", options=options)
        http = aiohttp.ClientSession(f"http://127.0.0.1:{ports.http}")
    else:
        credentials = grpc.ssl_channel_credentials(trusted.read_bytes())
        channel = grpc.aio.secure_channel(f"127.0.0.1:{ports.grpc}", credentials, options=options)
        connector = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=trusted))
        http = aiohttp.ClientSession(f"https://127.0.0.1:{ports.http}", connector=connector)
    try:
        if wait:
            await until(pod.is_ready)
        yield RunningPod(pod, runtime, channel, http, config.store)
    finally:
        await http.close()
        await channel.close()
        await pod.stop()
        await runtime.stop()


async def load_at_the_other(asked: RunningPod, other: RunningPod, name: str) -> None:
    """Register a model at one of two pods and load it at the other one, until the first one knows of the copy."""
    await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (asked, other)))
    await asked.register(name)
    await other.pod.registry.models.find(name)
    await other.pod.placement.ensure_loaded(name, wait=True, local_only=True)
    await until(lambda: any(copy.model.state == "loaded" for copy in asked.pod.states.status(name).copies))


async def code_of(call: "grpc.aio.Call | asyncio.Future[object]") -> tuple[grpc.StatusCode, str]:
    """Return the status code and the details of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""
