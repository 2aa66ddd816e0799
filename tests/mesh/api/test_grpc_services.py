"""A pod's own gRPC services, health and reflection, and gRPC calls that end early."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.register("m")
        yield running


async def test_health_lists_every_service(pod: RunningPod) -> None:
    await until(pod.pod.is_ready)
    statuses = (await health_pb2_grpc.HealthStub(pod.channel).List(health_pb2.HealthListRequest())).statuses
    assert {"", "mmesh.ModelMesh", "fmaas.GenerationService"} <= set(statuses)
    assert {answer.status for answer in statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}


async def test_older_management_service_refuses_methods_that_it_lacks(pod: RunningPod) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="Method not found") as caught:
        await pod.unary("/com.ibm.watson.tas.proto.TasRuntime/getStatus")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_every_service_that_it_lists(pod: RunningPod, version: str) -> None:
    """As grpcurl and buf curl do, which ask for v1 first."""
    method: grpc.aio.StreamStreamMultiCallable[Any, Any] = pod.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method()

    async def ask(**asked: str) -> Any:
        await call.write(reflection_pb2.ServerReflectionRequest(**asked))
        return await call.read()

    names = [service.name for service in (await ask(list_services="")).list_services_response.service]
    assert {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"} <= set(names)
    for name in names:
        raw = (await ask(file_containing_symbol=name)).file_descriptor_response.file_descriptor_proto
        files = [FileDescriptorProto.FromString(each) for each in raw]
        assert name in {f"{file.package}.{service.name}" for file in files for service in file.service}
    await call.done_writing()


@pytest.mark.parametrize(
    "method",
    [
        "grpc.channelz.v1.Channelz/GetServers",
        "grpc.reflection.v1.ServerReflection/Invented",
        "grpc.health.v2.Health/Check",
    ],
)
async def test_services_of_grpc_that_do_not_exist_are_unimplemented(pod: RunningPod, method: str) -> None:
    for metadata in ((), FOR_M):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pod.unary(f"/{method}")(b"", metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert pod.runtime.metadata == []


@pytest.mark.parametrize("verb", ["First", "Fail"])
async def test_inference_stream_that_ends_early_leaves_no_traceback(
    pod: RunningPod, caplog: pytest.LogCaptureFixture, verb: str
) -> None:
    """The runtime ends the call while the client is still sending."""

    async def messages() -> AsyncIterator[bytes]:
        yield b"ABORTED"
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0)

    for _ in range(5):
        call = pod.method(verb)(messages(), metadata=FOR_M)
        with contextlib.suppress(grpc.aio.AioRpcError):
            assert [message async for message in call] == [b"ABORTED"]
    gc.collect()  # a task whose exception was not retrieved is reported when it is collected
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    "method",
    [
        "mmesh.ModelMesh/registerModel",
        "inference.GRPCInferenceService/ModelReady",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ],
)
async def test_malformed_messages_are_invalid_and_leave_no_traceback(
    pod: RunningPod, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="cannot be read") as caught:
        async for _ in pod.server_stream(f"/{method}")(b"\xff\xff\xff"):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_health_watch_follows_readiness(pod: RunningPod) -> None:
    call = health_pb2_grpc.HealthStub(pod.channel).Watch(health_pb2.HealthCheckRequest(service=""))
    statuses = []
    async for answer in call:
        statuses.append(answer.status)
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            break
    call.cancel()
    assert statuses[-1] == health_pb2.HealthCheckResponse.SERVING
