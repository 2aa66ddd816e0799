"""A pod over a fake runtime: gRPC pass-through by model name."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.envoy import EMBEDDED, MODES, running_in, until_carried
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until
from wire.fmaas import generation_pb2 as fmaas
from wire.inference import grpc_predict_v2_pb2 as oip
from wire.inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", failure_expiry_s=0.2) as running:
        await running.register("m")
        yield running


@pytest.fixture(params=MODES)
async def either(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RunningPod]:
    """A pod with a loaded model, which its callers reach directly, through Envoy or through workers."""
    async with running_in(request.param, tmp_path / "pod", failure_expiry_s=0.2) as running:
        await running.register("m")
        await running.load("m")
        if request.param != EMBEDDED:
            await until_carried(running, "m")
        yield running


async def code_of(call: "grpc.aio.Call | asyncio.Future[object]") -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


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


async def test_inference_waiters_survive_an_unload_during_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    waiting = asyncio.ensure_future(pod.echo("m", timeout=10))
    await until(lambda: pod.runtime.loading)
    dropping = asyncio.ensure_future(pod.pod.placement.unload("m"))
    await until(lambda: pod.runtime.log.count(("load", "m")) == 2)
    gate.set()
    await dropping
    assert await waiting == b"hi"


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


@pytest.mark.parametrize(
    ("metadata", "code", "text"),
    [
        ((), "INVALID_ARGUMENT", "must include mm-model-id header"),
        ((("mm-model-id", ""),), "INVALID_ARGUMENT", "provided model-id header must be non-empty"),
        (
            (("mm-model-id", "m"), ("mm-vmodel-id", "v")),
            "INVALID_ARGUMENT",
            "must include only one of model id and vmodel id",
        ),
        ((("mm-model-id", "nope"),), "NOT_FOUND", "model not found: 'nope'; served here: m"),
        ((("mm-vmodel-id", "m"),), "NOT_FOUND", "vmodel not found"),
        ((("mm-model-id", "n"), ("mm-model-id", "o")), "NOT_FOUND", "none of the requested models were found"),
    ],
)
async def test_addressing_refuses_wrong_addresses(
    pod: RunningPod, metadata: tuple[tuple[str, str], ...], code: str, text: str
) -> None:
    got, details = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=metadata))
    assert got is grpc.StatusCode[code]
    assert text in details


async def test_addressing_binary_header_names_a_non_ascii_model(pod: RunningPod) -> None:
    await pod.register("modèle")
    call = pod.unary("/test.Any/Echo")
    code, _ = await code_of(call(b"hi", metadata=(("mm-model-id-bin", "modèle".encode()),)))
    # the fake knows models by the plain header only, which such an id cannot have
    assert code is grpc.StatusCode.NOT_FOUND
    assert dict(pod.runtime.metadata[-1])["mm-model-id-bin"] == "modèle".encode()
    assert "mm-model-id" not in dict(pod.runtime.metadata[-1])


async def test_inference_resolves_a_vmodel(either: RunningPod) -> None:
    model = await either.name("smol", "/files")
    await either.unary("/test.Any/Echo")(b"hi", metadata=(("mm-vmodel-id", "smol"),))
    assert dict(either.runtime.metadata[-1])["mm-model-id"] == model["model_id"]
    assert await either.echo("smol", b"by plain name") == b"by plain name"


async def test_addressing_reads_the_model_from_messages(pod: RunningPod) -> None:
    request = fmaas.BatchedGenerationRequest(model_id="m").SerializeToString()
    assert await pod.unary("/fmaas.GenerationService/Generate")(request) == request
    infer = oip.ModelInferRequest(model_name="m").SerializeToString()
    assert await pod.unary("/inference.GRPCInferenceService/ModelInfer")(infer) == infer
    other = fmaas.BatchedGenerationRequest(model_id="nope").SerializeToString()
    code, _ = await code_of(pod.unary("/fmaas.GenerationService/Generate")(other))
    assert code is grpc.StatusCode.NOT_FOUND
    # a header wins over what the message says, unless a configuration says otherwise
    assert await pod.unary("/fmaas.GenerationService/Generate")(other, metadata=FOR_M) == other


async def test_addressing_applies_the_dataplane_configuration(tmp_path: Path) -> None:
    config = '{"rpcConfigs": {"test.Any/Echo": {"idExtractionPath": [1], "vModelId": true}}, "allowOtherRpcs": false}'
    async with running_pod(tmp_path / "pod", dataplane_config=config) as pod:
        await pod.name("smol", "/files")
        message = fmaas.BatchedGenerationRequest(model_id="smol").SerializeToString()
        assert await pod.unary("/test.Any/Echo")(message, metadata=(("mm-model-id", "other"),)) == message
        code, _ = await code_of(pod.unary("/test.Any/Count")(b"1", metadata=(("mm-vmodel-id", "smol"),)))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        code, _ = await code_of(GRPCInferenceServiceStub(pod.channel).ModelReady(oip.ModelReadyRequest(name="smol")))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_inference_injects_the_concrete_id(tmp_path: Path) -> None:
    switches = Switches(methods={"fmaas.GenerationService/Generate": (1,)})
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        model = await pod.name("smol", "/files")
        request = fmaas.BatchedGenerationRequest(model_id="smol", requests=[fmaas.GenerationRequest(text="hi")])
        answer = await pod.unary("/fmaas.GenerationService/Generate")(request.SerializeToString())
        seen = fmaas.BatchedGenerationRequest.FromString(answer)
        assert (seen.model_id, seen.requests[0].text) == (model["model_id"], "hi")


async def test_addressing_refuses_the_runtimes_management(pod: RunningPod) -> None:
    code, details = await code_of(pod.unary("/mmesh.ModelRuntime/unloadModel")(b"", metadata=FOR_M))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "not permitted" in details


async def test_inference_lost_model_is_reloaded_unseen(either: RunningPod) -> None:
    await either.echo("m")
    either.runtime.drop("m")
    assert await either.echo("m", b"again") == b"again"
    assert either.runtime.log.count(("load", "m")) == 2


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


async def test_inference_refused_request_waits_for_a_newer_snapshot(pod: RunningPod) -> None:
    await pod.echo("m")
    pod.runtime.switches.engine_ready = False  # without a report
    generate = pod.unary("/fmaas.GenerationService/Generate")
    calls = [asyncio.ensure_future(generate(b"hi", metadata=FOR_M)) for _ in range(20)]
    await until(lambda: pod.pod.copies.num_waiting("m") == 20)
    assert not pod.pod.monitor.is_serving
    pod.runtime.switches.engine_ready = True
    pod.runtime.tell()
    assert await asyncio.gather(*calls) == [b"hi"] * 20
    assert 0 < pod.runtime.refusals <= 20  # requests after the new report were not refused at all


async def test_inference_hundred_requests_start_one_load(pod: RunningPod) -> None:
    pod.runtime.switches.load_gate = asyncio.Event()
    calls = [asyncio.ensure_future(pod.echo("m", str(index).encode())) for index in range(100)]
    await until(lambda: pod.pod.copies.num_waiting("m") == 100)
    pod.runtime.switches.load_gate.set()
    assert await asyncio.gather(*calls) == [str(index).encode() for index in range(100)]
    assert pod.runtime.log.count(("load", "m")) == 1
    assert pod.pod.copies.in_flight("m") == 0


async def test_inference_cancelled_waiter_does_not_stop_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    call = pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M)
    await until(lambda: "m" in pod.runtime.loading)
    call.cancel()
    await until(lambda: pod.pod.copies.num_waiting("m") == 0)
    gate.set()
    await until(lambda: "m" in pod.runtime.loaded)


async def test_inference_load_failure_has_its_cause_and_is_not_repeated_at_once(pod: RunningPod) -> None:
    pod.runtime.switches.fail["/m"] = "no tensors in it"
    for _ in range(2):
        code, details = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M))
        assert code is grpc.StatusCode.INTERNAL
        assert details.startswith("FAILED_PRECONDITION: no tensors in it")
    assert pod.runtime.log.count(("load", "m")) == 1
    assert pod.runtime.log.count(("unload", "m")) == 1
    pod.runtime.switches.fail.clear()
    await until(lambda: not pod.pod.states.blocked_for_s("m"))
    assert await pod.echo("m") == b"hi"


async def test_router_wait_budget_ends_in_unavailable_with_retry_hint(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", wait_budget_s=0.2) as pod:
        await pod.register("m")
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        call = pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M)
        code, details = await code_of(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "wait budget of 0.2 s" in details
        assert 1 <= int(str(dict(tuple(await call.trailing_metadata()))["retry-after"])) <= 120
        gate.set()
        await until(lambda: "m" in pod.runtime.loaded)


async def test_router_deadline_shorter_than_the_load(pod: RunningPod) -> None:
    pod.runtime.switches.load_gate = asyncio.Event()
    code, _ = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M, timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    pod.runtime.switches.load_gate.set()


async def test_router_refuses_more_waiters_than_allowed(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", max_held=2) as pod:
        await pod.register("m")
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        waiting = [asyncio.ensure_future(pod.echo("m")) for _ in range(2)]
        await until(lambda: pod.pod.copies.num_waiting("m") == 2)
        code, details = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the limit is 2" in details
        gate.set()
        await asyncio.gather(*waiting)


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


async def test_inference_evicts_least_used_at_capacity(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=25 * MB)) as pod:
        for name in ("a", "b", "c"):
            await pod.register(name)
        await pod.echo("a")
        await pod.echo("b")
        await pod.echo("a")
        await pod.echo("c")
        assert set(pod.runtime.loaded) == {"a", "c"}
        await pod.echo("b")
        # both a and c are idle, and a was used twice
        assert set(pod.runtime.loaded) == {"a", "b"}


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


@pytest.mark.parametrize(
    "method",
    [
        "repertory.RuntimeState/fit",
        "repertory.RuntimeState/watch",
        "mmesh.ModelRuntime/unloadModel",
        "com.ibm.watson.tas.internal.proto.ModelServer/unloadModel",
    ],
)
async def test_inference_does_not_forward_the_runtimes_own_methods(pod: RunningPod, method: str) -> None:
    await pod.echo("m")
    log = list(pod.runtime.log)
    assert (await code_of(pod.unary(f"/{method}")(b"", metadata=FOR_M)))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert pod.runtime.log == log
    assert not pod.runtime.fits
