"""The mesh's line per HTTP request: the name that was asked for, the outcome, and which lines are left to the runtime or to debug."""

import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from mesh.access.api_keys import digest_of
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as mm

LOGGER = "mesh.requests"


@pytest.fixture
async def pod(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.name("org/smol", "/files")
        caplog.set_level(logging.DEBUG, LOGGER)
        caplog.clear()
        yield running


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == LOGGER]


async def test_log_has_the_name_that_was_asked_for(pod: RunningPod, caplog: pytest.LogCaptureFixture) -> None:
    await pod.chat("org/smol")
    (line,) = lines(caplog)
    assert (line["code"], line["method"], line["path"]) == ("200", "POST", "/v1/chat/completions")
    assert line["asked"] == "org/smol"
    assert line["model"].startswith("org/smol__")
    assert 0 < line["first_s"] <= line["total_s"] + 0.001
    assert line["levelno"] == logging.INFO


async def test_log_is_left_to_a_runtime_that_logs(pod: RunningPod, caplog: pytest.LogCaptureFixture) -> None:
    pod.runtime.response_headers["x-repertory-logged"] = "1"
    _, _, headers = await pod.chat("org/smol")
    assert lines(caplog)[0]["levelno"] == logging.DEBUG
    assert "x-repertory-logged" not in headers
    sent = pod.runtime.headers[-1]
    assert sent["x-repertory-name"] == "org/smol"
    assert float(sent["x-repertory-waited"]) >= 0


async def test_log_headers_of_a_client_are_not_passed_on(pod: RunningPod) -> None:
    forged = {"x-repertory-name": "forged", "x-repertory-waited": "99"}
    async with pod.http.post("/v1/completions", json={"model": "org/smol"}, headers=forged) as answer:
        assert answer.status == 200
    assert pod.runtime.headers[-1]["x-repertory-name"] == "org/smol"
    assert float(pod.runtime.headers[-1]["x-repertory-waited"]) < 99


async def test_log_of_a_grpc_call_has_the_name_that_was_asked_for(
    pod: RunningPod, caplog: pytest.LogCaptureFixture
) -> None:
    await pod.echo("org/smol")
    (line,) = lines(caplog)
    assert (line["code"], line["method"], line["path"]) == ("OK", "gRPC", "/test.Any/Echo")
    assert line["asked"] == "org/smol"
    assert 0 < line["first_s"] <= line["total_s"] + 0.001
    assert line["levelno"] == logging.INFO


async def test_log_of_a_grpc_call_is_left_to_a_runtime_that_logs(
    pod: RunningPod, caplog: pytest.LogCaptureFixture
) -> None:
    pod.runtime.response_trailers["x-repertory-logged"] = "1"
    forged = (("x-repertory-name", "forged"), ("x-repertory-waited", "99"))
    call = pod.unary("/test.Any/Echo")(b"hi", metadata=(("mm-model-id", "org/smol"), *forged))
    await call
    assert lines(caplog)[0]["levelno"] == logging.DEBUG
    assert "x-repertory-logged" not in dict(await call.trailing_metadata())
    sent = [pair for pair in pod.runtime.metadata[-1] if pair[0].startswith("x-repertory-")]
    assert ("x-repertory-name", "org/smol") in sent
    assert [float(value) < 99 for key, value in sent if key == "x-repertory-waited"] == [True]


async def test_log_of_a_stream_that_breaks_off_is_not_200(pod: RunningPod, caplog: pytest.LogCaptureFixture) -> None:
    pod.runtime.response_headers["x-repertory-logged"] = "1"
    body = {"model": "org/smol", "stream": True, "chunks": 3, "break_at": 1}
    async with pod.http.post("/v1/chat/completions", json=body) as answer:
        assert answer.status == 200
        await answer.read()
    line = lines(caplog)[-1]
    assert (line["code"], line["levelno"]) == ("UNAVAILABLE", logging.INFO)


async def test_log_of_an_unknown_name_has_it(pod: RunningPod, caplog: pytest.LogCaptureFixture) -> None:
    status, _, _ = await pod.chat("nobody")
    assert status == 404
    line = lines(caplog)[0]
    assert (line["code"], line["asked"], line["levelno"]) == ("404", "nobody", logging.INFO)


async def test_log_of_polls_is_at_debug(pod: RunningPod, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/admin/v1/models/org%2Fsmol", "/admin/v1/models", "/readyz", "/admin/v1/models/nobody"):
        async with pod.http.get(path) as answer:
            await answer.read()
    assert {line["levelno"] for line in lines(caplog)} == {logging.DEBUG}


async def test_log_of_an_eviction_says_for_which_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh.placement.unloads")
    async with running_pod(tmp_path / "pod") as running:
        running.runtime.switches.default_size_bytes = 60 * 1024 * 1024
        for name in ("ada", "bob"):
            await running.register(name, f"/{name}")
            await running.load(name)
        (line,) = (vars(record) for record in caplog.records if record.name == "mesh.placement.unloads")
    assert line["message"].startswith("model ada: evicting it for bob")
    assert line["bytes"] == 60 * 1024 * 1024
    assert line["idle_s"] >= 0


async def test_log_has_management_by_grpc(pod: RunningPod, caplog: pytest.LogCaptureFixture) -> None:
    await pod.register("m", "/files")
    await pod.load("m")
    await pod.management.getModelStatus(mm.GetStatusRequest(modelId="m"))
    with pytest.raises(grpc.aio.AioRpcError):
        await pod.management.ensureLoaded(mm.EnsureLoadedRequest(modelId="nobody"), metadata=(("x-request-id", "abc"),))
    with pytest.raises(grpc.aio.AioRpcError):
        await pod.unary("/mmesh.ModelMesh/addModel")(b"\xff\xff")
    await until(lambda: len(lines(caplog)) == 5)
    shown = [(line["path"].rpartition("/")[2], line["asked"], line["code"], line["levelno"]) for line in lines(caplog)]
    assert shown == [
        ("registerModel", "m", "OK", logging.INFO),
        ("ensureLoaded", "m", "OK", logging.INFO),
        ("getModelStatus", "m", "OK", logging.DEBUG),
        ("ensureLoaded", "nobody", "NOT_FOUND", logging.INFO),
        ("addModel", "", "INVALID_ARGUMENT", logging.INFO),
    ]
    assert lines(caplog)[3]["request_id"] == "abc"
    assert lines(caplog)[0]["method"] == "gRPC"


async def test_log_has_refused_grpc_calls_with_the_keys_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(json.dumps({"keys": [{"name": "chat", "sha256": digest_of("secret"), "scopes": ["inference"]}]}))
    async with running_pod(tmp_path / "locked", api_keys_file=str(keys)) as locked:
        caplog.set_level(logging.INFO, LOGGER)
        for metadata, code in ((), "UNAUTHENTICATED"), ((("authorization", "Bearer secret"),), "PERMISSION_DENIED"):
            caplog.clear()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await locked.unary("/mmesh.ModelMesh/unregisterModel")(b"", metadata=metadata)
            assert caught.value.code().name == code
            (line,) = lines(caplog)
            assert (line["code"], line["path"]) == (code, "/mmesh.ModelMesh/unregisterModel")
            assert line["key"] == ("chat" if metadata else "")
