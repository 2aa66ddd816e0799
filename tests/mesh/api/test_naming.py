"""One naming rule on every surface of a pod: gRPC management, metadata, messages, HTTP bodies and paths."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest

from tests.support.pods import RunningPod, running_pod
from wire.fmaas import generation_pb2 as fmaas
from wire.mmesh import model_mesh_pb2 as mm

BAD = ["a\r\nERROR forged", "a\nb", "a\0b", "a\x1b[31mb", "a\u2028b", "a" * 5000]
INFO = mm.ModelInfo(type="llm", path="/m")


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.name("org/smol", "/files")
        yield running


MANAGEMENT: dict[str, Callable[[RunningPod, str], Any]] = {
    "registerModel": lambda pod, name: pod.management.registerModel(
        mm.RegisterModelRequest(modelId=name, modelInfo=INFO)
    ),
    "getModelStatus": lambda pod, name: pod.management.getModelStatus(mm.GetStatusRequest(modelId=name)),
    "ensureLoaded": lambda pod, name: pod.management.ensureLoaded(mm.EnsureLoadedRequest(modelId=name)),
    "setVModel": lambda pod, name: pod.management.setVModel(
        mm.SetVModelRequest(vModelId=name, targetModelId="t", modelInfo=INFO)
    ),
    "setVModel's target": lambda pod, name: pod.management.setVModel(
        mm.SetVModelRequest(vModelId="v", targetModelId=name, modelInfo=INFO)
    ),
    "getVModelStatus": lambda pod, name: pod.management.getVModelStatus(mm.GetVModelStatusRequest(vModelId=name)),
    "mm-model-id-bin": lambda pod, name: pod.unary("/test.Any/Echo")(
        b"", metadata=(("mm-model-id-bin", name.encode()),)
    ),
    "mm-vmodel-id-bin": lambda pod, name: pod.unary("/test.Any/Echo")(
        b"", metadata=(("mm-vmodel-id-bin", name.encode()),)
    ),
    "the message's field": lambda pod, name: pod.unary("/fmaas.GenerationService/Generate")(
        fmaas.BatchedGenerationRequest(model_id=name).SerializeToString()
    ),
}


@pytest.mark.parametrize("surface", MANAGEMENT)
async def test_grpc_refuses_names_that_break_the_rule(pod: RunningPod, surface: str) -> None:
    for name in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await MANAGEMENT[surface](pod, name)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (surface, name)
        details = refused.value.details() or ""
        assert details.isprintable()
        assert len(details) < 300


async def test_grpc_refuses_a_long_name_in_a_header(pod: RunningPod) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pod.echo("a" * 5000)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


HTTP: dict[str, Callable[[str], tuple[str, str, object]]] = {
    "completions": lambda name: ("POST", "/v1/completions", {"model": name}),
    "tokenize": lambda name: ("POST", "/tokenize", {"model": name}),
    "load": lambda name: ("POST", "/models/load", {"model": name}),
    "unload": lambda name: ("POST", "/models/unload", {"model": name}),
    "register": lambda name: ("POST", "/admin/v1/models", {"name": name, "uri": "/m"}),
    "fit": lambda name: ("POST", "/admin/v1/fit", {"name": name}),
    "alias": lambda name: ("PUT", f"/admin/v1/aliases/{quote(name, safe='')}", {"target": "org/smol"}),
    "alias's target": lambda name: ("PUT", "/admin/v1/aliases/other", {"target": name}),
    "show": lambda name: ("GET", f"/admin/v1/models/{quote(name, safe='')}", None),
    "remove": lambda name: ("DELETE", f"/admin/v1/models/{quote(name, safe='')}", None),
    "v1 model": lambda name: ("GET", f"/v1/models/{quote(name, safe='')}", None),
}


@pytest.mark.parametrize("surface", HTTP)
async def test_http_refuses_names_that_break_the_rule(pod: RunningPod, surface: str) -> None:
    for name in BAD:
        method, path, body = HTTP[surface](name)
        async with pod.http.request(method, path, json=body) as answer:
            text = await answer.text()
            assert answer.status == 400, (surface, name, text)
            assert len(text) < 400


async def test_http_refuses_paths_with_dot_segments(pod: RunningPod) -> None:
    for path in ("/v1/../metrics", "/v1/%2e%2e/%2e%2e/metrics", "/v1/./completions", "/v1/x%5c..%5cy", "/v1/x%00"):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        body = b'{"model": "org/smol"}'
        status = await _status_of(pod, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert status == 400, path
    assert pod.runtime.headers == []


async def test_unregister_removes_a_name_that_another_program_registered(pod: RunningPod) -> None:
    store = pod.pod.registry.models.table
    bad = "from\nelsewhere"
    await pod.register("plain")
    template = await store.find("plain")
    await store.update(bad, lambda _: template)
    await pod.management.unregisterModel(mm.UnregisterModelRequest(modelId=bad))
    assert await store.find(bad) is None


async def test_inference_replaces_a_request_id_that_it_cannot_log(
    pod: RunningPod, caplog: pytest.LogCaptureFixture
) -> None:
    await pod.load((await pod.model("org/smol"))["model_id"])
    with caplog.at_level(logging.INFO):
        await pod.unary("/test.Any/Echo")(b"", metadata=(("mm-model-id", "org/smol"), ("x-request-id", "a b" * 200)))
    received = [value for key, value in pod.runtime.metadata[-1] if key == "x-request-id"]
    assert len(received) == 1
    assert len(received[0]) == 32


async def _status_of(pod: RunningPod, request: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.pod.http.port)
    try:
        writer.write(request)
        answer: Coroutine[Any, Any, bytes] = reader.readline()
        return int((await answer).split()[1])
    finally:
        writer.close()
