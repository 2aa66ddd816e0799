"""Pods whose wall clocks are an hour apart: what one pod decides never depends on another machine's time."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import MB, FakeRuntime, Switches
from tests.support.mesh_process import MeshProcess, mesh_process
from tests.support.waiting import until_async
from wire.mmesh import model_mesh_pb2 as mm
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshStub

_HOUR_S = 3600.0
_EXPIRY_S = 2.0


@dataclass
class ClockPod:
    process: MeshProcess
    runtime: FakeRuntime
    channel: grpc.aio.Channel

    async def call(self, model_id: str) -> str:
        """Return the answer, or the status and its text."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary("/test.Any/Echo")
        try:
            return (await call(b"hi", metadata=(("mm-model-id", model_id),), timeout=20)).decode()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[list[ClockPod]]:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    found = []
    async with AsyncExitStack() as stack:
        for name, shift_s in (("behind", -_HOUR_S), ("right", 0.0), ("ahead", _HOUR_S)):
            folder = tmp_path / name
            folder.mkdir()
            runtime = FakeRuntime(folder, switches=Switches(capacity_bytes=20 * MB))
            await runtime.start()
            stack.push_async_callback(runtime.stop)
            process = stack.enter_context(
                mesh_process(
                    folder,
                    name,
                    store=store,
                    runtime_grpc=runtime.grpc_address,
                    runtime_http=runtime.http_address,
                    failure_expiry_s=_EXPIRY_S,
                    clock_shift_s=shift_s,
                )
            )
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(process.grpc_address))
            found.append(ClockPod(process, runtime, channel))
        for pod in found:
            await asyncio.to_thread(pod.process.wait_ready)
        yield found


async def register(pod: ClockPod, model_id: str) -> None:
    info = mm.ModelInfo(type="llm", path=f"/{model_id}")
    await ModelMeshStub(pod.channel).registerModel(mm.RegisterModelRequest(modelId=model_id, modelInfo=info))


def num_loads(pods: list[ClockPod], model_id: str) -> int:
    return sum(pod.runtime.log.count(("load", model_id)) for pod in pods)


async def test_clocks_an_hour_apart_load_each_model_once_and_count_failures_over_all_pods(pods: list[ClockPod]) -> None:
    ahead = pods[-1]
    for number in range(4):
        await register(ahead, f"m{number}")
        for pod in pods:
            assert await pod.call(f"m{number}") == "hi"
        assert num_loads(pods, f"m{number}") == 1
    for pod in pods:
        pod.runtime.switches.fail = {"/bad": "broken model"}
    await register(pods[0], "bad")
    for _ in range(10):
        for pod in pods:
            assert "broken model" in await pod.call("bad")
    first = num_loads(pods, "bad")
    # Three at once, and at most one for each backoff of 2, 4, … s that has passed meanwhile.
    assert 3 <= first <= 5
    for pod in pods:
        pod.runtime.switches.fail = {}

    async def is_answered() -> bool:
        return await pods[0].call("bad") == "hi"

    await until_async(is_answered, 30)


async def test_clocks_an_hour_apart_evict_the_least_used_model_on_every_pod(pods: list[ClockPod]) -> None:
    # Room for six models: those in use survive a stream of models that are called once, wherever each call comes in.
    used = ("u0", "u1", "u2")
    for model_id in (*used, *(f"once{number}" for number in range(9))):
        await register(pods[0], model_id)
    for _ in range(6):
        for number, model_id in enumerate(used):
            assert await pods[number].call(model_id) == "hi"
    for number in range(9):
        assert await pods[number % 3].call(f"once{number}") == "hi"
        for position, model_id in enumerate(used):
            assert await pods[(number + position) % 3].call(model_id) == "hi"
    assert [num_loads(pods, model_id) for model_id in used] == [1, 1, 1]
