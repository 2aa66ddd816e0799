"""The Open Inference Protocol's REST API of a pod over a fake runtime: what the mesh answers itself, and what it forwards."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", keep_alive_s=0.1) as running:
        await running.name("org/smol", "/files")
        yield running


async def ask(pod: RunningPod, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with pod.http.request(method, path, json=body) as answer:
        return answer.status, json.loads(await answer.text())


async def test_oip_answers_health_without_loading(pod: RunningPod) -> None:
    assert await ask(pod, "GET", "/v2/health/live") == (200, {"live": True})
    assert await ask(pod, "GET", "/v2/health/ready") == (200, {"ready": True})
    assert (await ask(pod, "GET", "/v2"))[1]["name"] == "repertory"
    assert await ask(pod, "GET", "/v2/models/org/smol/ready") == (200, {"name": "org/smol", "ready": True})
    assert (await ask(pod, "GET", "/v2/models/org/smol/versions/1/ready"))[0] == 200
    assert pod.runtime.loaded == {}


async def test_oip_readiness_of_a_failed_model(pod: RunningPod) -> None:
    pod.runtime.switches.fail["/files"] = "weights are truncated"
    status, answer = await ask(pod, "POST", "/v2/models/org/smol/infer", {})
    assert (status, "weights are truncated" in answer["error"]) == (424, True)
    assert await ask(pod, "GET", "/v2/models/org/smol/ready") == (503, {"name": "org/smol", "ready": False})
    [entry] = (await ask(pod, "POST", "/v2/repository/index"))[1]
    assert (entry["name"], entry["state"], "truncated" in entry["reason"]) == ("org/smol", "UNAVAILABLE", True)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/models/org/smol/infer"),
        ("POST", "/v2/models/org%2Fsmol/infer"),
        ("POST", "/v2/models/org/smol/versions/1/infer"),
        ("POST", "/v2/models/org/smol/generate"),
        ("GET", "/v2/models/org/smol"),
        ("GET", "/v2/models/org/smol/versions/1"),
    ],
)
async def test_oip_forwards_by_the_name_in_the_path(pod: RunningPod, method: str, path: str) -> None:
    model_id = (await pod.model("org/smol"))["model_id"]
    status, answer = await ask(pod, method, path, {"id": "7"} if method == "POST" else None)
    assert (status, answer["answer"]) == (200, model_id)
    assert answer["path"] == path.replace("%2F", "/")
    assert pod.runtime.headers[-1]["mm-model-id"] == model_id
    async with pod.http.get("/metrics") as metrics:
        assert 'requests_total{carrier="http",code="200",model_name="org/smol"} 1.0' in await metrics.text()


async def test_oip_passes_binary_tensors_unread(pod: RunningPod) -> None:
    sent = b'{"id": "7"}\x04\x00\x00\x00four'
    headers = {"Inference-Header-Content-Length": "11", "Content-Type": "application/octet-stream"}
    async with pod.http.post("/v2/models/org/smol/infer", data=sent, headers=headers) as answer:
        assert answer.status == 200
    assert pod.runtime.headers[-1]["Inference-Header-Content-Length"] == "11"
    assert pod.runtime.raw_bodies[-1] == sent


async def test_oip_stream_begins_with_comments_during_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    async with pod.http.post("/v2/models/org/smol/generate_stream", json={"stream": True}) as answer:
        assert (await answer.content.readany()).startswith(b": ")
        pod.runtime.switches.fail["/files"] = "weights are truncated"
        gate.set()
        last = (await answer.text()).rstrip("\n").split("\n\n")[-1]
    assert "weights are truncated" in json.loads(last.removeprefix("data: "))["error"]


async def test_oip_errors_are_texts(pod: RunningPod) -> None:
    for method, path in (("POST", "/v2/models/nobody/infer"), ("GET", "/v2/models/nobody/ready")):
        status, answer = await ask(pod, method, path)
        assert (status, list(answer), "served here: org/smol" in answer["error"]) == (404, ["error"], True)
    status, answer = await ask(pod, "GET", "/v2/models/org/smol/config")
    assert (status, "/metrics" in answer["error"]) == (501, True)
    status, answer = await ask(pod, "GET", "/v2/nothing")
    assert (status, isinstance(answer["error"], str)) == (404, True)


async def test_oip_reloads_a_model_that_the_runtime_has_lost(pod: RunningPod) -> None:
    """The runtime's answer has the protocol's own shape, so that only a header says that the model is not there."""
    pod.runtime.switches.text_errors = True
    assert (await ask(pod, "POST", "/v2/models/org/smol/infer", {}))[0] == 200
    pod.runtime.drop((await pod.model("org/smol"))["model_id"])
    assert (await ask(pod, "POST", "/v2/models/org/smol/infer", {}))[0] == 200


async def test_oip_repository_loads_and_unloads(pod: RunningPod) -> None:
    assert (await ask(pod, "POST", "/v2/repository/models/org/smol/load", {})) == (200, {})
    model_id = (await pod.model("org/smol"))["model_id"]
    assert model_id in pod.runtime.loaded
    assert (await ask(pod, "POST", "/v2/repository/index"))[1][0]["state"] == "READY"
    assert (await ask(pod, "POST", "/v2/repository/models/org/smol/unload", {})) == (200, {})
    await until(lambda: model_id not in pod.runtime.loaded)
    pod.runtime.switches.fail["/files"] = "weights are truncated"
    status, answer = await ask(pod, "POST", "/v2/repository/models/org/smol/load", {})
    assert (status, "weights are truncated" in answer["error"]) == (424, True)


async def test_oip_health_needs_no_key(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", api_keys=("secret",)) as pod:
        assert (await ask(pod, "GET", "/v2/health/ready"))[0] == 200
        status, answer = await ask(pod, "GET", "/v2")
        assert (status, isinstance(answer["error"], str)) == (401, True)
