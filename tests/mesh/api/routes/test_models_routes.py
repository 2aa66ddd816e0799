"""Model and admin routes of a pod: listings, events, loads, names, capacity and settings."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.model_state import CopyState
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until, until_async


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", keep_alive_s=0.1, failure_expiry_s=60.0) as running:
        await running.name("org/smol", "/files")
        yield running


async def test_models_routes_serve_chat_front_ends(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:

        async def status(name: str) -> dict[str, Any]:
            async with pod.http.get(f"/v1/models/{name}") as answer:
                body: dict[str, Any] = await answer.json()
                assert answer.status == 200, body
                return dict(body["status"])

        async def post(path: str, model: str) -> int:
            async with pod.http.post(path, json={"model": model}) as answer:
                return answer.status

        async with pod.http.get("/v1/models") as answer:
            assert (answer.status, await answer.json()) == (200, {"data": [], "object": "list"})
        await pod.name("org/smol", "/files")
        assert (await status("org/smol"))["value"] == "unloaded"
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        pod.runtime.switches.progress = 0.5
        assert await post("/models/load", "org/smol") == 200
        await until(lambda: pod.runtime.loading)

        async def has_progress() -> bool:
            return "progress" in await status("org/smol")

        async def is_loaded() -> bool:
            return bool((await status("org/smol"))["value"] == "loaded")

        async def has_failed() -> bool:
            return bool((await status("org/smol")).get("failed"))

        await until_async(has_progress)
        loading = await status("org/smol")
        assert loading["value"] == "loading"
        assert (loading["progress"]["current"], loading["progress"]["value"]) == ("pulling", 0.5)
        gate.set()
        await until_async(is_loaded)
        assert await post("/models/unload", "org/smol") == 200
        assert pod.runtime.loaded == {}
        assert (await status("org/smol"))["value"] == "unloaded"
        pod.runtime.switches.fail["/files"] = "broken"
        assert await post("/models/load", "org/smol") == 200
        await until_async(has_failed)
        failed = await status("org/smol")
        assert (failed["value"], failed["failed"], failed["error"]) == (
            "unloaded",
            True,
            "FAILED_PRECONDITION: broken",
        )
        assert await post("/models/load", "nope") == 404
        # asked for by name, it is tried again at once
        pod.runtime.switches.fail.clear()
        assert await post("/models/load", "org/smol") == 200
        await until(lambda: pod.runtime.loaded)


async def test_models_routes_unload_waits_for_requests_within_one_grace(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grace_s=0.5) as pod:
        await pod.name("m", "/files")
        pod.runtime.switches.chunk_s = 600.0
        stream = asyncio.create_task(pod.chat("m", stream=True))
        await until(lambda: pod.runtime.calls)
        async with asyncio.timeout(10), pod.http.post("/models/unload", json={"model": "m"}) as answer:
            assert answer.status == 200
        assert pod.runtime.loaded == {}
        assert ("x-repertory-grace-s", "0") in pod.runtime.metadata[-1]  # the runtime does not wait a second time
        stream.cancel()


async def test_models_routes_unload_now_ends_a_wait_for_requests(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grace_s=600.0) as pod:
        await pod.name("m", "/files")
        pod.runtime.switches.chunk_s = 600.0
        stream = asyncio.create_task(pod.chat("m", stream=True))
        await until(lambda: pod.runtime.calls)
        patient = asyncio.create_task(pod.http.post("/models/unload", json={"model": "m"}))
        await until(lambda: _is_unloading(pod))
        assert pod.runtime.loaded
        async with pod.http.post("/models/unload", json={"model": "m", "now": True}) as answer:
            assert answer.status == 200
        assert pod.runtime.loaded == {}
        assert (await patient).status == 200
        stream.cancel()
        await asyncio.wait([stream])


def _is_unloading(pod: RunningPod) -> bool:
    return any(copy.state is CopyState.UNLOADING for copy in pod.pod.copies)


async def test_models_routes_stream_each_change(pod: RunningPod) -> None:
    async with pod.http.get("/models/sse") as answer:
        assert (await _event(answer))["data"]["status"] == "unloaded"
        await pod.http.post("/models/load", json={"model": "org/smol"})
        seen = []
        while "loaded" not in seen:
            event = await _event(answer)
            assert (event["model"], event["event"]) == ("org/smol", "status_change")
            seen.append(event["data"]["status"])


async def _event(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    while True:
        line = (await asyncio.wait_for(answer.content.readline(), 10)).decode()
        if line.startswith("data: "):
            event: dict[str, Any] = json.loads(line[6:])
            return event


async def test_admin_routes_cover_a_models_life(pod: RunningPod) -> None:
    model = await pod.name("llm", "/other", quantize="nf4", load=True)
    assert (model["name"], model["uri"], model["settings"]["quantize"]) == ("llm", "/other", "nf4")

    async def is_loaded() -> bool:
        return bool((await pod.model("llm"))["state"] == "loaded")

    await until_async(is_loaded)
    model = await pod.model("llm")
    assert (model["status"], model["state"], model["tier"], model["weight_bytes"]) == (
        "LOADED",
        "loaded",
        "device",
        10 * MB,
    )
    assert len(model["copies"]) == 1
    async with pod.http.put("/admin/v1/aliases/best", json={"target": "llm"}) as answer:
        assert answer.status == 204
    assert (await pod.model("llm"))["aliases"] == ["best"]
    assert (await pod.chat("best"))[1]["answer"] == model["model_id"]
    async with pod.http.get("/admin/v1/models") as answer:
        assert [item["name"] for item in (await answer.json())["models"]] == ["best", "llm", "org/smol"]
    async with pod.http.post("/admin/v1/fit", json={"name": "llm"}) as answer:
        assert (await answer.json())["fits"] is True
    async with pod.http.post("/admin/v1/fit", json={"uri": "/other", "quantize": "nf4"}) as answer:
        assert (await answer.json())["weight_bytes"] == 10 * MB
    async with pod.http.post("/admin/v1/fit", json={}) as answer:
        assert answer.status == 400
    async with pod.http.get("/admin/v1/pods") as answer:
        assert [item["instance_id"] for item in (await answer.json())["pods"]] == ["pod"]
    async with pod.http.delete("/admin/v1/aliases/best") as answer:
        assert answer.status == 204
    async with pod.http.delete("/admin/v1/models/llm") as answer:
        assert answer.status == 204
    assert model["model_id"] not in pod.runtime.loaded
    assert (await pod.chat("llm"))[0] == 404
    async with pod.http.post(
        "/admin/v1/models", json={"name": "x", "uri": "/x", "storage_params": {"secret_access_key": "s3cr3t"}}
    ) as answer:
        assert answer.status == 400
        assert "s3cr3t" not in await answer.text()


async def test_admin_replaces_a_names_files_without_a_gap(pod: RunningPod) -> None:
    old = (await pod.name("org/smol", "/files"))["model_id"]
    assert (await pod.chat("org/smol"))[1]["answer"] == old
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    await pod.name("org/smol", "/newer")
    await until(lambda: pod.runtime.loading)
    for _ in range(3):
        assert (await pod.chat("org/smol"))[1]["answer"] == old
    gate.set()

    async def moved() -> bool:
        return bool((await pod.chat("org/smol"))[1]["answer"] != old)

    await until_async(moved)
    await until(lambda: old not in pod.runtime.loaded)
    assert [request["model"] for request in pod.runtime.bodies] == ["org/smol" for _ in pod.runtime.bodies]


async def test_admin_capacity_is_kept_by_unloading_the_longest_unused(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=25 * MB)) as pod:
        for name in ("a", "b", "c"):
            await pod.name(name, f"/{name}")
        for name in ("a", "b", "a", "c"):
            assert (await pod.chat(name))[0] == 200
        assert sorted(path for path in pod.runtime.loaded.values()) == ["/a", "/c"]
        await pod.name("huge", "/huge")
        pod.runtime.switches.size_bytes["/huge"] = 26 * MB
        status, body, _ = await pod.chat("huge")
        assert status == 424
        assert "needs 26000000 bytes; the capacity is 25000000 bytes" in body["error"]["message"]
        assert len(pod.runtime.loaded) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_model_len", -5),
        ("max_concurrency", 0),
        ("quantize", "q4_k_m"),
        ("dtype", "int4"),
        ("sampling", {"heat": 1}),
        ("sampling", {"top_p": 2}),
        ("sampling", {"top_p": 0}),
        ("sampling", {"temperature": 1000}),
        ("double_quant", True),
        ("display_name", "y"),
        ("quantise", "nf4"),
    ],
)
async def test_admin_refuses_settings_out_of_range(pod: RunningPod, field: str, value: object) -> None:
    async with pod.http.post("/admin/v1/models", json={"name": "x", "uri": "/x", field: value}) as answer:
        assert answer.status == 400
        assert field in (await answer.json())["error"]["message"]
    async with pod.http.get("/admin/v1/models/x") as answer:
        assert answer.status == 404


async def test_models_are_added_and_removed_as_open_webui_does(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    async with pod.http.post("/models", json={"model": "org/new"}) as answer:
        assert (answer.status, await answer.json()) == (200, {"success": True})
    model = await pod.model("org/new")
    assert (model["uri"], model["status"]) == ("hf://org/new", "LOADING")
    gate.set()
    await until(lambda: model["model_id"] in pod.runtime.loaded)
    async with pod.http.delete("/models", params={"model": "org/new"}) as answer:
        assert (answer.status, await answer.json()) == (200, {"success": True})
    assert model["model_id"] not in pod.runtime.loaded
    async with pod.http.get("/admin/v1/models/org/new") as answer:
        assert answer.status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/models", {}, 400),
        ("POST", "/models", {"model": "a b"}, 400),
        ("DELETE", "/models", None, 400),
        ("DELETE", "/models?model=nobody", None, 404),
    ],
)
async def test_models_are_not_added_or_removed_without_a_name(
    pod: RunningPod, method: str, path: str, body: Any, status: int
) -> None:
    async with pod.http.request(method, path, json=body) as answer:
        assert (answer.status, bool((await answer.json())["error"]["message"])) == (status, True)
