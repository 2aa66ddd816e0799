"""Methods known to take one message go on in one piece: with the same ids, retries, headers, rewrites and ends as any other."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.api.known_methods import single_message_methods
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, running_pod
from wire.fmaas import generation_pb2 as fmaas

SERVICE = "fmaas.GenerationService"
FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", switches=Switches(methods={f"{SERVICE}/Generate": (1,)})) as running:
        await running.register("m")
        yield running


def generate(pod: RunningPod) -> "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]":
    return pod.unary(f"/{SERVICE}/Generate")


def test_known_methods_lists_the_contracts() -> None:
    assert {
        f"{SERVICE}/Generate",
        f"{SERVICE}/GenerateStream",
        "inference.GRPCInferenceService/ModelInfer",
    } <= single_message_methods()
    assert "test.Any/Echo" not in single_message_methods()


async def test_known_methods_call_carries_the_injected_id(pod: RunningPod) -> None:
    message = fmaas.BatchedGenerationRequest(model_id="m", requests=[fmaas.GenerationRequest(text="hello")])
    answer = await generate(pod)(message.SerializeToString())
    assert fmaas.BatchedGenerationRequest.FromString(answer) == message
    assert pod.runtime.calls["m"] == 1


async def test_known_methods_unavailable_target_is_reported(pod: RunningPod) -> None:
    await pod.load("m")
    pod.runtime.switches.unavailable = 9
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(pod)(b"", metadata=FOR_M)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_known_methods_lost_model_is_reloaded_and_message_resent(pod: RunningPod) -> None:
    await pod.load("m")
    del pod.runtime.loaded["m"]  # nobody is told
    message = fmaas.BatchedGenerationRequest(model_id="m").SerializeToString()
    assert await generate(pod)(message) == message
    assert pod.runtime.log.count(("load", "m")) == 2


async def test_known_methods_stream_keeps_order_headers_and_trailers(pod: RunningPod) -> None:
    call = pod.server_stream(f"/{SERVICE}/GenerateStream")(b"150", metadata=FOR_M)
    assert [message async for message in call] == [str(index).encode() for index in range(150)]
    assert dict(await call.initial_metadata())["answered-by"] == "fake"
    assert dict(await call.trailing_metadata())["trailer"] == "kept"


async def test_known_methods_malformed_message_is_refused(pod: RunningPod) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(pod)(b"\xff\xff\xff", metadata=FOR_M)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
