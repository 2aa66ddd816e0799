"""Methods known to take one message go on in one piece: with the same ids, retries, headers, rewrites and ends as any other."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.api.known_methods import single_message_methods, unary_methods
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until
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
    assert f"{SERVICE}/GenerateStream" not in unary_methods()
    assert (
        {f"{SERVICE}/Generate", "inference.GRPCInferenceService/ModelInfer"}
        <= unary_methods()
        < single_message_methods()
    )


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
    del pod.runtime.loaded["m"]  # without a report
    message = fmaas.BatchedGenerationRequest(model_id="m").SerializeToString()
    assert await generate(pod)(message) == message
    assert pod.runtime.log.count(("load", "m")) == 2


async def test_known_methods_stream_keeps_order_headers_and_trailers(pod: RunningPod) -> None:
    # A number to the fake runtime, and an encoded message to the mesh, which looks for an adapter in it.
    call = pod.server_stream(f"/{SERVICE}/GenerateStream")(b"0102", metadata=FOR_M)
    assert [message async for message in call] == [str(index).encode() for index in range(102)]
    assert dict(await call.initial_metadata())["answered-by"] == "fake"
    assert dict(await call.trailing_metadata())["trailer"] == "kept"


async def test_known_methods_malformed_message_is_refused(pod: RunningPod) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(pod)(b"\xff\xff\xff", metadata=FOR_M)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_known_methods_unary_call_passes_headers_and_trailers_both_ways(pod: RunningPod) -> None:
    call = generate(pod)(b"", metadata=(*FOR_M, ("custom-bin", b"\x00\x80"), ("authorization", "Bearer secret")))
    await call
    seen = dict(pod.runtime.metadata[-1])
    assert (seen["custom-bin"], seen["mm-model-id"]) == (b"\x00\x80", "m")
    assert "authorization" not in seen
    assert dict(await call.initial_metadata())["answered-by"] == "fake"
    trailers = dict(await call.trailing_metadata())
    assert (trailers["trailer"], trailers["trailer-bin"]) == ("kept", b"\x01\xfe")


async def test_known_methods_unary_call_for_several_models_is_answered_with_all(pod: RunningPod) -> None:
    await pod.register("n")
    answer = await generate(pod)(b"", metadata=(*FOR_M, ("mm-model-id", "n")))
    parts = fmaas.BatchedGenerationRequest.FromString(answer)
    assert parts.model_id == "n"  # merging takes the last value of a field
    assert answer.count(b"\x0a\x01") == 2
    assert (pod.runtime.calls["m"], pod.runtime.calls["n"]) == (1, 1)


async def test_known_methods_unary_cancellation_and_deadline_reach_the_runtime(pod: RunningPod) -> None:
    await pod.load("m")
    pod.runtime.switches.mute = True
    left = generate(pod)(b"", metadata=FOR_M)
    await until(lambda: pod.runtime.running == 1)
    left.cancel()
    await until(lambda: pod.runtime.cancelled == ["m"])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(pod)(b"", metadata=FOR_M, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    deadline_s = pod.runtime.deadlines[-1]
    assert deadline_s is not None
    assert 0 < deadline_s < 0.5
    await until(lambda: pod.runtime.cancelled == ["m", "m"])
    await until(lambda: pod.pod.copies.in_flight("m") == 0)


async def test_known_methods_unary_memory_is_given_back(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "small", request_memory_bytes=150_000) as pod:
        await pod.register("m")
        message = fmaas.BatchedGenerationRequest(
            requests=[fmaas.GenerationRequest(text="x" * 100_000)]
        ).SerializeToString()
        for _ in range(3):
            assert await generate(pod)(message, metadata=FOR_M) == message
        pod.runtime.switches.mute = True
        held = generate(pod)(message, metadata=FOR_M)
        await until(lambda: pod.runtime.running == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(pod)(message, metadata=FOR_M)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        pod.runtime.switches.mute = False
        pod.runtime.tell()
        assert await asyncio.wait_for(held, 5) == message
