"""text-generation-inference's HTTP API of a pod over a fake runtime: how a request names its model, and errors in TGI's shape."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.pods import RunningPod, running_pod


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", keep_alive_s=0.1) as running:
        await running.name("org/smol", "/files")
        yield running


async def post(pod: RunningPod, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    async with pod.http.post(path, json=body, headers=headers) as answer:
        return answer.status, json.loads(await answer.text())


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/tgi/org/smol/generate", {}, {}),
        ("/tgi/org%2Fsmol", {"model": "nobody"}, {}),
        ("/tgi/org/smol/v1/chat/completions", {"model": "tgi"}, {}),
        ("/tgi/org/smol/tokenize", {}, {}),
        ("/tgi/org/smol/", {}, {}),
        ("/generate", {"model": "nobody"}, {"mm-model-id": "org/smol"}),
        ("/generate", {"model": "org/smol"}, {}),
        ("/", {"parameters": {"adapter_id": "org/smol"}, "model": "nobody"}, {}),
    ],
)
async def test_tgi_names_a_model(pod: RunningPod, path: str, body: Any, headers: dict[str, str]) -> None:
    await pod.name("other", "/other")
    model_id = (await pod.model("org/smol"))["model_id"]
    status, answer = await post(pod, path, body, **headers)
    assert (status, answer.get("answer"), answer.get("path")) == (200, model_id, path.replace("%2F", "/"))


async def test_tgi_takes_the_only_model(pod: RunningPod) -> None:
    model_id = (await pod.model("org/smol"))["model_id"]
    async with pod.http.put("/admin/v1/aliases/also", json={"target": "org/smol"}) as answer:
        assert answer.status == 204
    assert (await post(pod, "/generate", {}))[1]["answer"] == model_id
    async with pod.http.get("/info") as answer:
        assert (await answer.json())["answer"] == model_id
    await pod.name("other", "/other")
    status, answer = await post(pod, "/generate", {})
    assert (status, answer["error_type"]) == (422, "validation")
    assert "registered models: also, org/smol, other" in answer["error"]


async def test_tgi_health_loads_nothing(pod: RunningPod) -> None:
    async with pod.http.get("/tgi/org/smol/health") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
    async with pod.http.get("/tgi/nobody/health") as answer:
        assert (answer.status, (await answer.json())["error_type"]) == (404, "not_found")
    assert pod.runtime.loaded == {}


async def test_tgi_errors_have_its_shape(pod: RunningPod) -> None:
    assert (await post(pod, "/tgi/nobody/generate", {}))[1]["error_type"] == "not_found"
    assert (await post(pod, "/generate", []))[1]["error_type"] == "validation"
    assert "message" in (await post(pod, "/tgi/nobody/v1/completions", {}))[1]["error"]
    pod.runtime.switches.fail["/files"] = "weights are truncated"
    status, answer = await post(pod, "/generate", {})
    assert (status, answer["error_type"], "weights are truncated" in answer["error"]) == (424, "generation", True)


@pytest.mark.parametrize(("path", "body"), [("/generate_stream", {}), ("/", {"stream": True})])
async def test_tgi_stream_begins_with_comments_during_the_load(pod: RunningPod, path: str, body: Any) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    async with pod.http.post(path, json=body) as answer:
        assert (await answer.content.readany()).startswith(b": ")
        pod.runtime.switches.fail["/files"] = "weights are truncated"
        gate.set()
        last = (await answer.text()).rstrip("\n").split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error_type"] == "generation"
