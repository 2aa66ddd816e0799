"""Model views: last use, weights, failures, and which models a fit would unload."""

from pathlib import Path
from typing import Any

from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as mm


async def _fit(pod: RunningPod, **ask: str) -> dict[str, Any]:
    async with pod.http.post("/admin/v1/fit", json=ask) as answer:
        body: dict[str, Any] = await answer.json()
        assert answer.status == 200, body
        return body


async def test_model_view_last_use_of_an_unused_model_is_zero(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        assert (await pod.name("m", "/first"))["last_used_ms"] == 0
        await pod.register("plain")
        assert (await pod.model("plain"))["last_used_ms"] == 0
        info = mm.ModelInfo(type="llm", path="/m")
        await pod.management.registerModel(
            mm.RegisterModelRequest(modelId="loaded", modelInfo=info, loadNow=True, sync=True)
        )
        assert "loaded" in pod.runtime.loaded
        assert (await pod.model("loaded"))["last_used_ms"] == 0
        # Other files under the same name do not change the time of last use, neither before the first use nor after it.
        assert (await pod.name("m", "/second"))["last_used_ms"] == 0
        await pod.chat("m")
        used_ms = (await pod.model("m"))["last_used_ms"]
        assert used_ms > 0
        await pod.pod.placement.unload((await pod.model("m"))["model_id"])
        assert (await pod.model("m"))["last_used_ms"] == used_ms
        third = await pod.name("m", "/third")
        assert third["uri"] == "/third"
        assert third["last_used_ms"] == used_ms


async def test_model_view_remembers_weights_of_unloaded_models(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        pod.runtime.switches.size_bytes["/m"] = 7 * MB
        assert (await pod.name("m", "/m"))["weight_bytes"] == 0
        await pod.chat("m")
        model_id = (await pod.model("m"))["model_id"]
        models = pod.pod.registry.models
        await until(lambda: (record := models.get(model_id)) is not None and record.weight_bytes == 7 * MB)
        await pod.pod.placement.unload(model_id)
        assert (await pod.model("m"))["weight_bytes"] == 7 * MB
    async with running_pod(tmp_path / "pod") as pod:
        assert (await pod.model("m"))["weight_bytes"] == 7 * MB, "after a restart too"


async def test_fit_lists_the_models_to_unload(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=25 * MB)) as pod:
        for name in ("a", "b", "c"):
            await pod.name(name, f"/{name}")
        assert (await _fit(pod, name="c"))["evicts"] == []
        for name in ("a", "b", "a"):
            assert (await pod.chat(name))[0] == 200
        assert (await _fit(pod, name="c"))["evicts"] == ["b"]
        assert (await _fit(pod, name="a"))["evicts"] == [], "it is loaded"
        pod.runtime.switches.size_bytes["/large"] = 20 * MB
        assert (await _fit(pod, uri="/large"))["evicts"] == ["b", "a"]
        pod.runtime.switches.size_bytes["/huge"] = 26 * MB
        assert (await _fit(pod, uri="/huge"))["evicts"] == []
        assert sorted(pod.runtime.loaded.values()) == ["/a", "/b"], "an estimate unloads no model"


async def test_model_view_load_failure_has_the_name_not_the_id(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        model_id = (await pod.name("odd", "/odd"))["model_id"]
        assert model_id != "odd"
        pod.runtime.switches.fail["/odd"] = "the checkpoint has no weights"
        status, body, _ = await pod.chat("odd")
        assert (status, body["error"]["message"]) == (
            424,
            "FAILED_PRECONDITION: the checkpoint has no weights (model odd failed to load)",
        )
        assert (await pod.model("odd"))["error"] == "FAILED_PRECONDITION: the checkpoint has no weights"
