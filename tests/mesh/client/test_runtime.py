"""The runtime client against a scripted mmesh.ModelRuntime: readiness, sizes, errors, and what is undone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh.client.runtime import GrpcRuntime
from mesh.errors import InvalidRequest, LoadFailed, MeshError, NotSupported, Overloaded, Unavailable
from mesh.types import LoadAnswer, ModelInfo
from tests.support.waiting import until
from wire.mmesh import model_runtime_pb2 as pb
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeServicer, add_ModelRuntimeServicer_to_server

READY = pb.RuntimeStatusResponse(
    status=pb.RuntimeStatusResponse.READY,
    capacityInBytes=100,
    maxLoadingConcurrency=2,
    modelLoadingTimeoutMs=5000,
    defaultModelSizeInBytes=10,
)
INFO = ModelInfo("llm", "/m", "{}")


class Script(ModelRuntimeServicer):
    """Answers from attributes. `load`: a status to abort with, a size, or "hang"."""

    def __init__(self) -> None:
        self.statuses: list[pb.RuntimeStatusResponse] = []
        self.num_asked = 0
        self.loading: list[str] = []
        self.load: str | int = 7
        self.load_trailers: tuple[tuple[str, str], ...] = ()
        self.predict = 5
        self.predictions = 0
        self.unload = ""
        self.unloaded: list[str] = []

    async def runtimeStatus(self, request: pb.RuntimeStatusRequest, context: Any) -> pb.RuntimeStatusResponse:
        self.num_asked += 1
        if not self.statuses:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return self.statuses.pop(0)

    async def loadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        self.loading.append(request.modelId)
        if self.load == "hang":
            await asyncio.sleep(3600)
        if isinstance(self.load, str):
            await context.abort(grpc.StatusCode[self.load], "the cause", self.load_trailers)
        return pb.LoadModelResponse(sizeInBytes=int(self.load))

    async def unloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        self.unloaded.append(request.modelId)
        if self.unload:
            await context.abort(grpc.StatusCode[self.unload], "no")
        return pb.UnloadModelResponse()

    async def predictModelSize(self, request: pb.PredictModelSizeRequest, context: Any) -> pb.PredictModelSizeResponse:
        self.predictions += 1
        if self.predict < 0:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
        return pb.PredictModelSizeResponse(sizeInBytes=self.predict)

    async def modelSize(self, request: pb.ModelSizeRequest, context: Any) -> pb.ModelSizeResponse:
        return pb.ModelSizeResponse(sizeInBytes=42)


@pytest.fixture
async def scripted(tmp_path: Path) -> AsyncIterator[tuple[Script, GrpcRuntime]]:
    script, server = Script(), grpc.aio.server()
    add_ModelRuntimeServicer_to_server(script, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        yield script, GrpcRuntime(channel)
    await server.stop(0)


async def test_runtime_wait_ready_polls(scripted: tuple[Script, GrpcRuntime]) -> None:
    script, runtime = scripted
    waiting = asyncio.ensure_future(runtime.wait_ready(10))
    await until(lambda: script.num_asked >= 2)
    script.statuses = [pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING), READY]
    limits = await waiting
    assert (
        limits.capacity_bytes,
        limits.max_loading_concurrency,
        limits.model_loading_timeout_s,
        limits.allow_any_method,
    ) == (
        100,
        2,
        5.0,
        True,
    )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda status: setattr(status, "status", pb.RuntimeStatusResponse.FAILING), Unavailable),
        (lambda status: setattr(status, "maxLoadingConcurrency", 0), InvalidRequest),
        (lambda status: setattr(status, "modelLoadingTimeoutMs", 50), InvalidRequest),
    ],
)
async def test_runtime_refuses_an_unusable_runtime(
    scripted: tuple[Script, GrpcRuntime], change: Callable[[pb.RuntimeStatusResponse], None], error: type[MeshError]
) -> None:
    script, runtime = scripted
    status = pb.RuntimeStatusResponse()
    status.CopyFrom(READY)
    change(status)
    script.statuses = [status]
    with pytest.raises(error):
        await runtime.wait_ready(5)


async def test_runtime_wait_ready_gives_up(scripted: tuple[Script, GrpcRuntime]) -> None:
    with pytest.raises(Unavailable, match="not ready after"):
        await scripted[1].wait_ready(0.2)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("FAILED_PRECONDITION", LoadFailed),
        ("INVALID_ARGUMENT", LoadFailed),
        ("INTERNAL", LoadFailed),
        ("RESOURCE_EXHAUSTED", Overloaded),
        ("UNAVAILABLE", LoadFailed),
    ],
)
async def test_runtime_failed_load_is_cleaned_up(
    scripted: tuple[Script, GrpcRuntime], status: str, error: type[MeshError]
) -> None:
    script, runtime = scripted
    script.load = status
    with pytest.raises(error, match="the cause"):
        await runtime.load("m", INFO, 5)
    assert script.unloaded == ["m"]


async def test_runtime_load_that_is_lost_in_a_shutdown_is_no_failure_of_the_model(
    scripted: tuple[Script, GrpcRuntime],
) -> None:
    script, runtime = scripted
    script.load, script.load_trailers = "UNAVAILABLE", (("retry-after-ms", "1000"),)
    with pytest.raises(Unavailable, match="the cause"):
        await runtime.load("m", INFO, 5)


async def test_runtime_load_that_is_late_or_cancelled_is_cleaned_up(scripted: tuple[Script, GrpcRuntime]) -> None:
    script, runtime = scripted
    script.load = "hang"
    with pytest.raises(LoadFailed, match="longer than"):
        await runtime.load("m", INFO, 0.1)
    loading = asyncio.ensure_future(runtime.load("n", INFO, 60))
    await until(lambda: "n" in script.loading)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert script.unloaded == ["m", "n"]


async def test_runtime_sizes(scripted: tuple[Script, GrpcRuntime]) -> None:
    script, runtime = scripted
    assert await runtime.load("m", INFO, 5) == LoadAnswer(7)
    script.load = 0
    assert await runtime.load("m", INFO, 5) == LoadAnswer(42)
    assert await runtime.predict_size("m", INFO) == 5
    script.predict = 0
    assert await runtime.predict_size("m", INFO) is None
    script.predict = -1
    assert await runtime.predict_size("m", INFO) is None
    asked = script.predictions
    assert await runtime.predict_size("m", INFO) is None
    assert script.predictions == asked


async def test_runtime_unload_is_idempotent(scripted: tuple[Script, GrpcRuntime]) -> None:
    script, runtime = scripted
    script.unload = "NOT_FOUND"
    await runtime.unload("m")
    script.unload = "UNAVAILABLE"
    with pytest.raises(Unavailable, match="model m"):
        await runtime.unload("m")
    with pytest.raises(NotSupported):
        await runtime.fit("m", INFO)
