"""What each kind of key may do, on every route and every method of a pod, known and invented."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

import wire
from mesh.access.api_keys import digest_of
from tests.support.envoy import MODES, running_in
from tests.support.pods import RunningPod
from tests.support.waiting import until
from wire.fmaas import generation_pb2
from wire.inference import grpc_predict_v2_pb2
from wire.mmesh import model_mesh_pb2, model_runtime_pb2
from wire.repertory import runtime_pb2

KINDS = ("inference", "management", "metrics")
OPEN_PATHS = {"/", "/health", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
OPEN_METHODS = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
}
SEEN_BY_BOTH = (
    "/v1/models",
    "/models/sse",
    "/v2/repository/index",
    "/api/tags",
    "/api/ps",
    "/api/show",
    "/api/version",
    "/openapi.json",
)
INVENTED_METHODS = (
    "/grpc.health.v1.Health/Checks",
    "/grpc.health.v1.Health/",
    "/grpc.health.v1.Invented/Check",
    "/grpc.reflection.v1.ServerReflection/Invented",
    "/grpc.reflection.v1alpha.ServerReflection/Invented",
    "//grpc.health.v1.Health/Check",
    "/GRPC.health.v1.Health/Check",
    "/mmesh.ModelMesh/invented",
    "/mmesh.ModelMesh/addModel",
    "/com.ibm.watson.tas.proto.TasRuntime/addModel",
    "/test.Any/Echo",
    "/",
    "/a",
)
INVENTED_PATHS = ("/nothing", "/health/", "/health/x", "/healthz%2F..", "/v1", "/admin", "/metrics/x", "/HEALTH")


@pytest.fixture(params=MODES)
async def pod(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RunningPod]:
    keys: list[dict[str, object]] = [{"name": kind, "sha256": digest_of(kind), "scopes": [kind]} for kind in KINDS]
    keys.append({"name": "narrow", "sha256": digest_of("narrow"), "scopes": [*KINDS], "models": ["team/*"]})
    keys.append({"name": "one", "sha256": digest_of("one"), "max_concurrent": 1})
    keys.append({"name": "slow", "sha256": digest_of("slow"), "requests_per_minute": 1})
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    file = str(tmp_path / "keys.json")
    async with running_in(request.param, tmp_path / "pod", api_keys=("all",), api_keys_file=file) as running:
        yield running


def routes(pod: RunningPod) -> Iterator[tuple[str, str]]:
    """All routes of the pod with a name in place of each variable, and invented paths."""
    for any_method, pattern in pod.pod.http.routes():
        method = any_method.replace("*", "PUT")
        yield method, pattern.replace("{name}", "team/none").replace("{path}", "x").replace("{version}", "1")
    for path in INVENTED_PATHS:
        yield "GET", path
        yield "POST", path


def methods() -> Iterator[str]:
    modules = (generation_pb2, grpc_predict_v2_pb2, model_mesh_pb2, model_runtime_pb2, runtime_pb2)
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}"
    yield from OPEN_METHODS
    yield from INVENTED_METHODS


async def status_of(pod: RunningPod, method: str, path: str, key: str | None, header: str = "Authorization") -> int:
    value = f"Bearer {key}" if header == "Authorization" else str(key)
    headers = {header: value} if key is not None else {}
    body = b"{}" if method in ("POST", "PUT") else None
    async with pod.http.request(method, path, data=body, headers=headers) as answer:
        return answer.status


async def code_of(pod: RunningPod, method: str, key: str | None, model: str = "team/none") -> grpc.StatusCode:
    metadata: list[tuple[str, str]] = [("mm-model-id", model)]
    if key is not None:
        metadata.append(("authorization", f"Bearer {key}"))
    call = pod.server_stream(method)(b"", metadata=tuple(metadata), timeout=5)
    try:
        await call.read()
        call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_walk_covers_every_generated_service() -> None:
    """A service that is added to proto/ must be added to the walk."""
    packages = {path.name for path in Path(wire.__path__[0]).iterdir() if path.is_dir() and path.name[0] != "_"}
    assert packages == {"fmaas", "inference", "mmesh", "repertory"}


async def test_http_without_a_valid_key_opens_health_and_nothing_else(pod: RunningPod) -> None:
    found = set(routes(pod))
    assert len(found) > 40
    for method, path in found:
        is_open = path in OPEN_PATHS and method in ("GET", "HEAD")
        for key, header in (
            (None, "Authorization"),
            ("wrong", "Authorization"),
            ("wrong", "x-api-key"),
            ("", "x-api-key"),
        ):
            status = await status_of(pod, method, path, key, header)
            assert (status != 401) == is_open, (method, path, key, status)
    assert pod.runtime.log == [("purge", "")]


async def test_http_key_opens_the_routes_of_its_scopes(pod: RunningPod) -> None:
    for method, path in set(routes(pod)):
        if (path in OPEN_PATHS and method in ("GET", "HEAD")) or path in INVENTED_PATHS or path == "/models/sse":
            continue
        if path == "/metrics":
            allowed = {"metrics"}
        elif path == "/models" and method in ("POST", "DELETE"):
            allowed = {"management"}
        elif path.startswith(SEEN_BY_BOTH) or path in ("/models", "/v2"):
            allowed = {"inference", "management"}
        elif path.startswith(("/admin/", "/models/", "/v2/repository/models/")) or path.endswith("load_lora_adapter"):
            allowed = {"management"}
        else:
            allowed = {"inference"}
        for kind in KINDS:
            status = await status_of(pod, method, path, kind)
            assert status != 401
            assert (status != 403) == (kind in allowed), (method, path, kind, status)


async def test_inference_key_may_not_unload_through_ollamas_api(pod: RunningPod) -> None:
    registration = {"name": "smol", "uri": "/files"}
    async with pod.http.post("/admin/v1/models", json=registration, headers={"x-api-key": "all"}) as answer:
        assert answer.status == 200
    body = {"model": "smol", "keep_alive": 0}
    for key, status in (("inference", 403), ("narrow", 403), ("all", 200)):
        async with pod.http.post("/api/generate", json=body, headers={"x-api-key": key}) as answer:
            assert answer.status == status, key


async def test_grpc_without_a_valid_key_opens_health_and_reflection_and_nothing_else(pod: RunningPod) -> None:
    for method in methods():
        for key in (None, "wrong", ""):
            code = await code_of(pod, method, key)
            assert (code is not grpc.StatusCode.UNAUTHENTICATED) == (method in OPEN_METHODS), (method, key, code)
    assert pod.runtime.metadata == []


async def test_grpc_key_opens_the_methods_of_its_scopes(pod: RunningPod) -> None:
    for method in methods():
        if method in OPEN_METHODS:
            continue
        is_management = method.startswith(("/mmesh.ModelMesh/", "/com.ibm.watson.tas.proto.TasRuntime/"))
        for kind in KINDS:
            code = await code_of(pod, method, kind)
            is_allowed = kind == ("management" if is_management else "inference")
            assert (code is not grpc.StatusCode.PERMISSION_DENIED) == is_allowed, (method, kind, code)
            assert code is not grpc.StatusCode.UNAUTHENTICATED
    assert pod.runtime.metadata == [], "no model of that name is registered"


async def test_key_reaches_only_the_models_of_its_patterns(pod: RunningPod) -> None:
    everything = {"Authorization": "Bearer all"}
    for name in ("team/a", "other"):
        async with pod.http.post("/admin/v1/models", json={"name": name, "uri": "/m"}, headers=everything) as answer:
            assert answer.status == 200
    narrow = {"Authorization": "Bearer narrow"}
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("POST", "/v1/completions", {"model": "other"}),
        ("POST", "/tokenize", {"model": "other"}),
        ("POST", "/api/show", {"model": "other"}),
        ("POST", "/tgi/other/generate", {}),
        ("POST", "/v2/models/other/infer", {}),
        ("GET", "/v2/models/other/ready", {}),
        ("POST", "/v2/repository/models/other/load", {}),
        ("POST", "/models/load", {"model": "other"}),
        ("POST", "/models/unload", {"model": "other"}),
        ("POST", "/admin/v1/models", {"name": "other", "uri": "/n"}),
        ("POST", "/admin/v1/fit", {"name": "other"}),
        ("PUT", "/admin/v1/aliases/team%2Fb", {"target": "other"}),
        ("PUT", "/admin/v1/aliases/third", {"target": "team/a"}),
        ("DELETE", "/admin/v1/aliases/other", {}),
        ("GET", "/admin/v1/models/other", {}),
        ("GET", "/v1/models/other", {}),
        ("DELETE", "/admin/v1/models/other", {}),
    ]
    for method, path, body in requests:
        async with pod.http.request(method, path, json=body, headers=narrow) as answer:
            assert answer.status == 403, (method, path, await answer.text())
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/models"),
        ("GET", "/admin/v1/models"),
        ("POST", "/v2/repository/index"),
        ("GET", "/api/tags"),
    ):
        async with pod.http.request(method, path, headers=narrow) as answer:
            text = await answer.text()
            assert "team/a" in text
            assert "other" not in text, path
    async with pod.http.post("/v1/completions", json={"model": "team/x"}, headers=narrow) as answer:
        assert answer.status == 404
        assert "other" not in await answer.text(), "suggestions are from the key's models"
    async with pod.http.post("/v1/completions", json={"model": "team/a"}, headers=narrow) as answer:
        assert answer.status == 200
    assert await code_of(pod, "/test.Any/Echo", "narrow", "other") is grpc.StatusCode.PERMISSION_DENIED
    assert await code_of(pod, "/test.Any/Echo", "narrow", "team/a") is grpc.StatusCode.OK


async def test_management_by_grpc_reaches_only_the_models_of_its_patterns(pod: RunningPod) -> None:
    metadata = (("authorization", "Bearer narrow"),)
    stub, mm = pod.management, model_mesh_pb2
    info = mm.ModelInfo(type="llm", path="/m")
    for call in (
        stub.registerModel(mm.RegisterModelRequest(modelId="other", modelInfo=info), metadata=metadata),
        stub.unregisterModel(mm.UnregisterModelRequest(modelId="other"), metadata=metadata),
        stub.getModelStatus(mm.GetStatusRequest(modelId="other"), metadata=metadata),
        stub.getModelStatus(mm.GetStatusRequest(modelId="***GETSTATE***"), metadata=metadata),
        stub.ensureLoaded(mm.EnsureLoadedRequest(modelId="other"), metadata=metadata),
        stub.setVModel(mm.SetVModelRequest(vModelId="other", targetModelId="team/a"), metadata=metadata),
        stub.setVModel(mm.SetVModelRequest(vModelId="team/v", targetModelId="other"), metadata=metadata),
        stub.deleteVModel(mm.DeleteVModelRequest(vModelId="other"), metadata=metadata),
        stub.getVModelStatus(mm.GetVModelStatusRequest(vModelId="other"), metadata=metadata),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await stub.registerModel(mm.RegisterModelRequest(modelId="team/a", modelInfo=info), metadata=metadata)


async def test_concurrency_of_a_key_is_limited_over_both_ports(pod: RunningPod) -> None:
    everything = {"Authorization": "Bearer all"}
    async with pod.http.post("/admin/v1/models", json={"name": "m", "uri": "/m"}, headers=everything) as answer:
        assert answer.status == 200
    one = (("mm-model-id", "m"), ("authorization", "Bearer one"))
    slow = pod.server_stream("/test.Any/Slow")(b"", metadata=one)
    assert await slow.read() == b"first"
    assert await code_of(pod, "/test.Any/Echo", "one", "m") is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with pod.http.post("/v1/completions", json={"model": "m"}, headers={"x-api-key": "one"}) as answer:
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
    assert await code_of(pod, "/test.Any/Echo", "inference", "m") is grpc.StatusCode.OK
    slow.cancel()
    async with asyncio.timeout(5):
        while await code_of(pod, "/test.Any/Echo", "one", "m") is not grpc.StatusCode.OK:
            await asyncio.sleep(0.01)


async def test_rate_of_a_key_is_limited_for_inference_only(pod: RunningPod) -> None:
    assert await status_of(pod, "POST", "/v1/completions", "slow") == 400
    assert await status_of(pod, "POST", "/v1/completions", "slow") == 429
    assert await status_of(pod, "GET", "/v1/models", "slow") == 200


@pytest.mark.parametrize("pod", ["embedded"], indirect=True)  # the runtime logs what Envoy carries
async def test_key_is_named_in_metrics_and_log_and_never_shown(
    pod: RunningPod, caplog: pytest.LogCaptureFixture
) -> None:
    everything = {"Authorization": "Bearer all"}
    async with pod.http.post("/admin/v1/models", json={"name": "m", "uri": "/m"}, headers=everything):
        pass
    with caplog.at_level(logging.DEBUG):
        assert await code_of(pod, "/test.Any/Echo", "narrow", "m") is grpc.StatusCode.PERMISSION_DENIED
        metadata = (("mm-model-id", "m"), ("authorization", "Bearer inference"))
        call = pod.server_stream("/test.Any/Echo")(b"", metadata=metadata, timeout=5)
        assert [message async for message in call] == [b""]
        async with pod.http.post("/v1/completions", json={"model": "m"}, headers={"x-api-key": "inference"}) as answer:
            assert answer.status == 200
        assert await status_of(pod, "GET", "/metrics", "inference") == 403
        expected = {("narrow", "PERMISSION_DENIED"), ("inference", "OK"), ("inference", "200"), ("inference", "403")}

        def named() -> set[tuple[object, object]]:
            return {(record.__dict__.get("key"), record.__dict__.get("code")) for record in caplog.records}

        await until(lambda: expected <= named())  # a call is logged after its answer
    async with pod.http.get("/metrics", headers=everything) as answer:
        text = await answer.text()
    assert 'repertory_mesh_key_requests_total{carrier="http",code="200",key="inference"} 1.0' in text
    assert 'repertory_mesh_key_requests_total{carrier="grpc",code="PERMISSION_DENIED",key="narrow"} 1.0' in text
