"""Ollama's API of a pod over a fake runtime, through the official client: lists, forwarding by name, loading and unloading."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import ollama
import pytest

from tests.support.pods import RunningPod, running_pod


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.name("org/smol", "/files")
        yield running


@pytest.fixture
async def client(pod: RunningPod) -> AsyncIterator[ollama.AsyncClient]:
    async with ollama.AsyncClient(host=f"http://127.0.0.1:{pod.pod.http.port}") as found:
        yield found


async def test_tags_lists_registered_models(pod: RunningPod, client: ollama.AsyncClient) -> None:
    [model] = (await client.list()).models
    assert (model.model, model.size) == ("org/smol", 0)
    before = model.digest
    assert (await client.ps()).models == []
    await pod.name("org/smol", "/other-files", load=True)
    [model] = (await client.list()).models
    assert model.digest != before
    assert model.details is not None
    assert model.details.format == "safetensors"


async def test_ps_lists_loaded_models(pod: RunningPod, client: ollama.AsyncClient) -> None:
    await pod.chat("org/smol")
    [model] = (await client.ps()).models
    assert (model.name, model.model, model.size) == ("org/smol", "org/smol", 10_000_000)
    assert model.expires_at is not None


@pytest.mark.parametrize("name", ["org/smol", "org/smol:latest"])
async def test_inference_is_forwarded_by_name(pod: RunningPod, name: str) -> None:
    model_id = (await pod.model("org/smol"))["model_id"]
    for path in ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings"):
        async with pod.http.post(path, json={"model": name, "prompt": "a", "stream": False}) as answer:
            body = await answer.json()
        assert (answer.status, body["answer"], body["path"]) == (200, model_id, path)


async def test_ollama_routes_prefer_an_exact_name_to_the_tag(pod: RunningPod) -> None:
    await pod.name("org/smol:latest", "/tagged")
    tagged = (await pod.model("org/smol:latest"))["model_id"]
    async with pod.http.post("/api/chat", json={"model": "org/smol:latest", "stream": False}) as answer:
        assert (await answer.json())["answer"] == tagged


@pytest.mark.parametrize("keep_alive", [0, 0.0, "0", "0s", "0.0m"])
async def test_keep_alive_of_zero_unloads(pod: RunningPod, client: ollama.AsyncClient, keep_alive: float | str) -> None:
    await pod.chat("org/smol")
    answer = await client.generate(model="org/smol", prompt="", keep_alive=keep_alive)
    assert (answer.done, answer.done_reason) == (True, "unload")
    assert (await client.ps()).models == []
    # Without a prompt and with any other time, the runtime answers once the model is loaded.
    async with pod.http.post("/api/chat", json={"model": "org/smol", "keep_alive": "5m"}) as asked:
        assert asked.status == 200
    assert len((await client.ps()).models) == 1


async def test_show_loads_nothing(pod: RunningPod, client: ollama.AsyncClient) -> None:
    answer = await client.show("org/smol")
    assert answer.capabilities == ["completion"]
    assert pod.runtime.loaded == {}
    await pod.chat("org/smol")
    async with pod.http.post("/api/show", json={"name": "org/smol"}) as forwarded:
        assert (await forwarded.json())["path"] == "/api/show"


async def test_version_and_refusals(pod: RunningPod, client: ollama.AsyncClient) -> None:
    async with pod.http.get("/api/version") as answer:
        assert (await answer.json())["version"].split(".")[0] == "0"
    with pytest.raises(ollama.ResponseError, match="served here: org/smol") as caught:
        await client.chat(model="nobody", messages=[{"role": "user", "content": "a"}])
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="/admin/v1/models") as caught:
        await client.pull("llama3")
    assert caught.value.status_code == 501


async def test_ollama_routes_end_a_broken_stream_with_an_error_line(pod: RunningPod) -> None:
    pod.runtime.switches.content_type = "application/x-ndjson"
    body = {"model": "org/smol", "stream": True, "chunks": 5, "break_at": 2}
    async with pod.http.post("/api/chat", json=body) as answer:
        last = (await answer.text()).splitlines()[-1]
    assert "broke off" in json.loads(last)["error"]
