"""ModelMesh's metrics: names, types, labels and buckets, and what each counts."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from mesh.observability.metric_series import LabelledHistogram
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until_async

RECORDED = Path(__file__).parents[1] / "modelmesh" / "recorded" / "three_pods.json"
FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    switches = Switches(capacity_bytes=25 * MB, max_concurrency=1, load_s=0.02)
    async with running_pod(tmp_path / "pod", switches=switches, foreign=True) as running:
        for model_id in ("m", "other", "third"):
            await running.register(model_id)
        yield running


async def scrape(pod: RunningPod) -> str:
    async with pod.http.get("/metrics") as answer:
        return await answer.text()


async def families(pod: RunningPod) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(await scrape(pod))}


async def count(pod: RunningPod, name: str, **labels: str) -> float:
    """The number of values in a histogram."""
    samples = (await families(pod))[name].samples
    return next((one.value for one in samples if one.name == f"{name}_count" and one.labels == labels), 0)


async def test_metrics_names_and_types_are_modelmeshs(pod: RunningPod) -> None:
    step = json.loads(RECORDED.read_text())["metrics"][-1]
    leader = max(step["answers"], key=len)
    types = [" ".join(line.split()[2:]) for line in (await scrape(pod)).splitlines() if line.startswith("# TYPE ")]
    assert sorted(line for line in types if line.startswith("modelmesh_")) == sorted(leader)


async def test_metrics_count_each_stage_of_a_call(pod: RunningPod) -> None:
    await pod.echo("m", b"x" * 600)
    call = {"method": "Echo", "code": "OK"}
    for name in ("api_request_milliseconds", "invoke_model_milliseconds", "request_size_bytes", "response_size_bytes"):
        assert await count(pod, f"modelmesh_{name}", **call) == 1, name
    for name in ("cache_miss", "req_queue_delay", "loadmodel", "loading_queue_delay"):
        assert await count(pod, f"modelmesh_{name}_milliseconds") == 1, name
    sizes = (await families(pod))["modelmesh_request_size_bytes"].samples
    buckets = {one.labels["le"]: one.value for one in sizes if one.name.endswith("_bucket")}
    assert (buckets["512.0"], buckets["2048.0"], buckets["+Inf"]) == (0, 1, 1)
    assert next(one.value for one in sizes if one.name.endswith("_sum")) == 600
    await pod.echo("m")
    assert await count(pod, "modelmesh_cache_miss_milliseconds") == 1, "a call of a loaded model is not a miss"


async def test_metrics_count_failures_of_the_runtime(pod: RunningPod) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await pod.unary("/test.Any/Fail")(b"INTERNAL", metadata=FOR_M)
    assert await count(pod, "modelmesh_invoke_model_milliseconds", method="other", code="INTERNAL") == 1
    pod.runtime.switches.fail["/broken"] = "broken"
    await pod.register("broken", "/broken")
    await pod.load("broken")
    assert (await families(pod))["modelmesh_loadmodel_failure"].samples[0].value == 1


async def test_metrics_count_evictions(pod: RunningPod) -> None:
    for model_id in ("m", "other", "third"):
        await pod.load(model_id)

    async def is_unloaded() -> bool:
        return await count(pod, "modelmesh_unloadmodel_milliseconds") == 1

    await until_async(is_unloaded)
    assert await count(pod, "modelmesh_age_at_eviction_milliseconds") == 1
    assert await count(pod, "modelmesh_loaded_model_size_bytes") == 3


def test_labelled_histogram_counts_a_bound_in_its_bucket() -> None:
    histogram = LabelledHistogram("name", "about", (1, 10), ("code",))
    for value in (0.5, 1, 1.5, 10, 11):
        histogram.observe(value, "OK")
    samples = histogram.family().samples
    assert [(one.labels["le"], one.value) for one in samples if one.name == "name_bucket"] == [
        ("1.0", 2),
        ("10.0", 4),
        ("+Inf", 5),
    ]
    assert next(one.value for one in samples if one.name == "name_sum") == 24
