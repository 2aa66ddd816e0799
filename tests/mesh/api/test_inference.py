"""A pod over a fake runtime: gRPC pass-through by model name."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.pods import RunningPod, code_of, running_pod
from tests.support.waiting import until
from wire.inference import grpc_predict_v2_pb2 as oip
from wire.inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

FOR_M = (("mm-model-id", "m"),)


async def test_inference_unary_call_loads_the_model(pod: RunningPod) -> None:
    assert await pod.echo("m", b"payload \x00\xff") == b"payload \x00\xff"
    assert pod.runtime.log == [("purge", ""), ("load", "m")]


async def test_inference_bidirectional_stream_interleaves(either: RunningPod) -> None:
    call = either.method("Echo")(metadata=FOR_M)
    for index in range(3):
        await call.write(str(index).encode())
        assert await call.read() == str(index).encode()
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_inference_server_stream_keeps_order(either: RunningPod) -> None:
    call = either.server_stream("/test.Any/Count")(b"200", metadata=FOR_M)
    assert [message async for message in call] == [str(index).encode() for index in range(200)]


async def test_inference_passes_headers_and_trailers_both_ways(either: RunningPod) -> None:
    metadata = (*FOR_M, ("x-request-id", "abc"), ("custom-bin", b"\x00\x80"), ("authorization", "Bearer secret"))
    call = either.unary("/test.Any/Echo")(b"hi", metadata=metadata)
    await call
    seen = dict(either.runtime.metadata[-1])
    assert seen["x-request-id"] == "abc"
    assert seen["custom-bin"] == b"\x00\x80"
    assert seen["mm-model-id"] == "m"
    assert seen["mm-model-id-bin"] == b"m"
    assert "authorization" not in seen
    assert ("answered-by", "fake") in tuple(await call.initial_metadata())
    trailers = dict(tuple(await call.trailing_metadata()))
    assert trailers["trailer"] == "kept"
    assert trailers["trailer-bin"] == b"\x01\xfe"


async def test_inference_passes_status_details_and_trailers(either: RunningPod) -> None:
    call = either.unary("/test.Any/Fail")(b"FAILED_PRECONDITION", metadata=FOR_M)
    code, details = await code_of(call)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert details in ("test.Any/Fail: FAILED_PRECONDITION: as asked", "as asked"), "the mesh adds ModelMesh's prefix"
    trailers = dict(tuple(await call.trailing_metadata()))
    assert (trailers["why"], trailers["why-bin"]) == ("because", b"\x00\xff")


async def test_inference_unknown_methods_share_one_metrics_label(pod: RunningPod) -> None:
    await pod.echo("m")
    assert (await code_of(pod.unary("/test.Any/Fail")(b"INVALID_ARGUMENT", metadata=FOR_M)))[
        0
    ] is grpc.StatusCode.INVALID_ARGUMENT
    async with pod.http.get("/metrics") as answer:
        text = await answer.text()
    assert 'method="other"' in text
    assert 'method="Echo"' in text
    assert 'method="Fail"' not in text


async def test_inference_passes_a_runtimes_cancelled_status(either: RunningPod) -> None:
    call = either.unary("/test.Any/Fail")(b"CANCELLED", metadata=FOR_M, timeout=5)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await call
    assert await call.code() is grpc.StatusCode.CANCELLED


async def test_inference_cancellation_reaches_the_runtime(either: RunningPod) -> None:
    call = either.server_stream("/test.Any/Slow")(b"go", metadata=FOR_M)
    assert await call.read() == b"first"
    call.cancel()
    await until(lambda: either.runtime.cancelled == ["m"])
    await until(lambda: either.pod.copies.in_flight("m") == 0)


async def test_inference_deadline_reaches_the_runtime(either: RunningPod) -> None:
    await either.load("m")
    call = either.server_stream("/test.Any/Slow")(b"go", metadata=FOR_M, timeout=0.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    deadline_s = either.runtime.deadlines[-1]
    assert deadline_s is not None
    assert 0 < deadline_s < 1
    await until(lambda: either.runtime.cancelled == ["m"])


async def test_inference_message_limits_hold_both_ways(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grpc_max_message_bytes=100_000) as pod:
        await pod.register("m")
        assert len(await pod.echo("m", b"x" * 90_000)) == 90_000
        code, _ = await code_of(pod.unary("/test.Any/Echo")(b"x" * 110_000, metadata=FOR_M))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        code, _ = await code_of(pod.unary("/test.Any/Big")(b"110000", metadata=FOR_M))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_inference_passes_status_of_a_call_that_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = grpc.aio.StreamStreamCall.done_writing

    async def too_late(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        await said(call)
        raise grpc.aio.InternalError("Failed execute_batch")  # as gRPC's own does, at times, of a call that has ended

    async with running_pod(tmp_path / "pod", grpc_max_message_bytes=100_000) as pod:
        await pod.register("m")
        monkeypatch.setattr("grpc.aio._call.StreamStreamCall.done_writing", too_late)
        asked = pod.unary("/test.Any/Big")(b"110000", metadata=FOR_M)
        code, _ = await asyncio.wait_for(code_of(asked), 60)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_inference_retries_unavailable_once(pod: RunningPod) -> None:
    await pod.echo("m")
    # a method of one message: of the others grpc.aio may lose the status, and then they are asked for again on that account too
    generate = pod.unary("/fmaas.GenerationService/Generate")
    pod.runtime.switches.unavailable = 1
    assert await generate(b"hi", metadata=FOR_M) == b"hi"
    pod.runtime.switches.unavailable = 2
    assert await code_of(generate(b"hi", metadata=FOR_M)) == (
        grpc.StatusCode.UNAVAILABLE,
        "fmaas.GenerationService/Generate: UNAVAILABLE: restarting",
    )
    assert (pod.runtime.refusals, pod.runtime.switches.unavailable) == (3, 0)


@pytest.mark.parametrize("method", ["/test.Any/Echo", "/fmaas.GenerationService/Generate"])
async def test_inference_repeats_a_call_whose_status_is_lost(pod: RunningPod, method: str) -> None:
    """gRPC loses the status of a call that its target ends before the message is sent, as a pod does that does not have the model any more."""
    await pod.echo("m")
    pod.runtime.switches.lost_statuses = 2
    assert await pod.unary(method)(b"hi", metadata=FOR_M) == b"hi"
    call = pod.method("Echo")(metadata=FOR_M)
    pod.runtime.switches.lost_statuses = 2
    await call.write(b"streamed")
    assert await call.read() == b"streamed"
    call.cancel()


async def test_grpc_server_serves_health_reflection_and_oip(pod: RunningPod) -> None:
    health = health_pb2_grpc.HealthStub(pod.channel)
    await until(pod.pod.is_ready)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    oip_stub = GRPCInferenceServiceStub(pod.channel)
    assert (await oip_stub.ServerLive(oip.ServerLiveRequest())).live
    assert (await oip_stub.ServerReady(oip.ServerReadyRequest())).ready
    assert (await oip_stub.ServerMetadata(oip.ServerMetadataRequest())).name == "repertory"
    stub = reflection_pb2_grpc.ServerReflectionStub(pod.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    services = {
        service.name
        async for item in stub.ServerReflectionInfo(iter([asked]))
        for service in item.list_services_response.service
    }
    assert {"mmesh.ModelMesh", "fmaas.GenerationService", "grpc.health.v1.Health"} <= services
    assert pod.runtime.metadata == []


async def test_oip_model_ready_neither_loads_nor_uses_the_model(pod: RunningPod) -> None:
    ready = GRPCInferenceServiceStub(pod.channel).ModelReady
    assert (await ready(oip.ModelReadyRequest(name="m"))).ready, "it would be loaded when it is called"
    assert (await ready(oip.ModelReadyRequest(), metadata=FOR_M)).ready
    assert not (await ready(oip.ModelReadyRequest(name="nobody"))).ready
    assert not (await ready(oip.ModelReadyRequest(), metadata=(("mm-vmodel-id", "m"),))).ready
    assert (await code_of(ready(oip.ModelReadyRequest())))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert pod.runtime.log == [("purge", "")]


async def test_key_guard_protects_inference_but_not_health(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", api_keys=("k1", "k2")) as pod:
        call = pod.unary("/test.Any/Echo")
        code, _ = await code_of(call(b"hi", metadata=FOR_M))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        for method in (
            "/grpc.health.v1.Health/Checks",
            "/grpc.health.v1.Invented/Echo",
            "/grpc.reflection.v1.ServerReflection/Invented",
            "/grpc.reflection.v1alpha.Invented/Echo",
        ):
            code, _ = await code_of(pod.unary(method)(b"hi", metadata=FOR_M))
            assert code is grpc.StatusCode.UNAUTHENTICATED, method
        code, _ = await code_of(call(b"hi", metadata=(*FOR_M, ("authorization", "Bearer k3"))))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        code, _ = await code_of(call(b"hi", metadata=(*FOR_M, ("authorization", "Bearer k2"))))
        assert code is grpc.StatusCode.NOT_FOUND
        await health_pb2_grpc.HealthStub(pod.channel).Check(health_pb2.HealthCheckRequest())


async def test_grpc_server_allows_keepalive_pings_of_waiting_clients(pod: RunningPod) -> None:
    """Keep-alive pings are what keeps a silent stream open at a load balancer; a server that takes them for abuse ends the request."""
    pod.runtime.switches.load_gate = asyncio.Event()
    await pod.register("held")
    options = (
        ("grpc.keepalive_time_ms", 1_700),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{pod.pod.grpc.port}", options=options) as channel:
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Any/Echo")
        call = echo(b"hi", metadata=(("mm-model-id", "held"),))
        # Five pings, none within a second of another even if some are late. By default gRPC closes the connection at the fifth.
        await asyncio.sleep(10.0)
        pod.runtime.switches.load_gate.set()
        assert await call == b"hi"
