"""GET / and GET /openapi.json of a pod over a fake runtime."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.pods import RunningPod, running_pod

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        yield running


async def test_root_answers_clients_with_json(pod: RunningPod) -> None:
    await pod.name("org/smol", "/files")
    await pod.name("other", "/other")
    await pod.chat("org/smol")
    async with pod.http.get("/") as answer:
        assert answer.headers["Content-Type"] == "application/json"
        body = await answer.json()
    assert body["name"] == "repertory"
    assert body["models"] == [
        {"name": "org/smol", "state": "loaded", "tier": "device"},
        {"name": "other", "state": "not loaded", "tier": ""},
    ]
    for path in body["links"]:
        async with pod.http.get(path) as answer:
            assert answer.status == 200, path
    async with pod.http.head("/") as answer:
        assert answer.status == 200


async def test_root_answers_a_browser_with_a_page(pod: RunningPod) -> None:
    async with pod.http.get("/", headers=BROWSER) as answer:
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "No model is registered" in await answer.text()
    await pod.name("<b>smol", "/files")
    async with pod.http.get("/", headers=BROWSER) as answer:
        page = await answer.text()
    assert "<td>&lt;b&gt;smol<td>not loaded" in page
    assert "<b>" not in page


async def test_root_lists_no_models_where_keys_are_needed(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", api_keys=("secret",)) as pod:
        key = {"Authorization": "Bearer secret"}
        async with pod.http.post("/admin/v1/models", json={"name": "smol", "uri": "/m"}, headers=key) as answer:
            assert answer.status == 200
        async with pod.http.get("/") as answer:
            assert (answer.status, (await answer.json())["models"]) == (200, None)
        async with pod.http.get("/", headers=BROWSER) as answer:
            assert "smol" not in await answer.text()


async def openapi(pod: RunningPod) -> Any:
    async with pod.http.get("/openapi.json") as answer:
        assert answer.status == 200
        return await answer.json()


async def test_openapi_describes_every_route(pod: RunningPod) -> None:
    document = await openapi(pod)
    described = {(verb.upper(), path) for path, verbs in document["paths"].items() for verb in verbs}
    assert described == {(method, path) for method, path in pod.pod.http.routes() if method not in ("HEAD", "*")}
    load = document["paths"]["/models/load"]["post"]
    assert load["summary"].startswith("Start a load")
    shown = document["paths"]["/v1/models/{name}"]["get"]
    assert shown["parameters"] == [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]


async def test_openapi_takes_forwarded_routes_from_the_runtime(pod: RunningPod) -> None:
    of_chat = {"summary": "Answer a chat", "responses": {}}
    pod.runtime.openapi = {
        "paths": {"/v1/chat/completions": {"post": of_chat}, "/only/here": {"post": {}}},
        "components": {"schemas": {"ChatBody": {}}},
    }
    document = await openapi(pod)
    assert document["paths"]["/v1/chat/completions"]["post"] == of_chat
    assert "/only/here" not in document["paths"]
    assert document["components"] == {"schemas": {"ChatBody": {}}}
