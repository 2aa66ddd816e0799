"""The numbers of our runtime as ModelMesh's pods understand them, and the figures that were measured with ModelMesh."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.units import GIB, MIB
from runtime.config.schema import EngineConfig, RuntimeConfig
from runtime.models.capacity import Capacity
from tests.support.modelmesh_arithmetic import UNIT_BYTES, ModelMeshPod, Refused, int32, units_of
from tests.support.spi_runtime import SLAB, SpiRuntime
from wire.mmesh import model_runtime_pb2 as pb
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeStub

HOUR_MS = 3_600_000


def status(
    capacity_bytes: int = 900 * MIB,
    default_bytes: int = 90 * MIB,
    loading_concurrency: int = 2,
    timeout_ms: int = 600_000,
) -> pb.RuntimeStatusResponse:
    return pb.RuntimeStatusResponse(
        status=pb.RuntimeStatusResponse.READY,
        capacityInBytes=capacity_bytes,
        maxLoadingConcurrency=loading_concurrency,
        modelLoadingTimeoutMs=timeout_ms,
        defaultModelSizeInBytes=default_bytes,
    )


@pytest.mark.parametrize(("timeout_ms", "guard_s"), [(HOUR_MS, 12_000), (600_000, 2_000), (90_000, 300), (1_000, 30)])
def test_modelmesh_guard_is_ten_thirds_of_the_load_timeout(timeout_ms: int, guard_s: int) -> None:
    assert ModelMeshPod.of(status(timeout_ms=timeout_ms)).min_churn_age_ms == guard_s * 1000


def test_modelmesh_serves_nine_tenths_of_900_mib() -> None:
    pod = ModelMeshPod.of(status())
    assert pod.effective_units * UNIT_BYTES == 810 * MIB
    assert pod.full_below_units == units_of(90 * MIB), "the guard arms when one model of the default size has no room"


def test_modelmesh_a_small_default_arms_the_guard_late() -> None:
    tenth, fiftieth = (ModelMeshPod.of(status(default_bytes=900 * MIB // part)) for part in (10, 50))
    model_units = units_of(280 * MIB)
    free_units = [pod.effective_units - 2 * model_units for pod in (tenth, fiftieth)]
    assert free_units[0] < model_units, "a third model evicts one"
    assert tenth.full_below_units > 2 * fiftieth.full_below_units
    assert tenth.unload_reserve_units == 5 * fiftieth.unload_reserve_units


@pytest.mark.parametrize(
    ("max_concurrency", "most"),
    [(2**31 - 1, 16), (2**28, 16), (2**28 - 1, 2**31 - 8), (512, 4096), (2, 16), (3, 24), (0, 16)],
)
def test_modelmesh_queue_overflows_from_2_to_the_28(max_concurrency: int, most: int) -> None:
    assert ModelMeshPod.of(status()).most_in_flight(max_concurrency) == most


@pytest.mark.parametrize(
    ("max_concurrency", "num_calls", "num_failed"), [(2**31 - 1, 80, 64), (512, 300, 0), (512, 4096, 0)]
)
def test_modelmesh_calls_at_once(max_concurrency: int, num_calls: int, num_failed: int) -> None:
    most = ModelMeshPod.of(status()).most_in_flight(max_concurrency)
    assert max(0, num_calls - most) == num_failed


def test_modelmesh_a_predicted_size_of_0_is_never_loaded() -> None:
    pod = ModelMeshPod.of(status())
    with pytest.raises(Refused):
        pod.insertion_weight(0)
    assert pod.insertion_weight(1) == 1
    assert pod.insertion_weight(None) == pod.default_units
    with pytest.raises(Refused):
        pod.insertion_weight(811 * MIB)


@given(st.integers(0, 2**40))
def test_int32_is_javas(value: int) -> None:
    assert int32(value).to_bytes(4, "big", signed=True) == (value % 2**32).to_bytes(4, "big")


@given(st.integers(10 * UNIT_BYTES, 16 * 1024 * GIB - UNIT_BYTES), st.integers(1, 8))
def test_capacity_of_any_size_starts_modelmesh_and_leaves_nine_tenths(capacity_bytes: int, threads: int) -> None:
    default_bytes = Capacity("none", capacity_bytes, SLAB, 16).default_size_bytes
    pod = ModelMeshPod.of(status(capacity_bytes, default_bytes, threads))
    assert pod.effective_units >= 0.9 * pod.capacity_units - 1
    assert pod.insertion_weight(None) <= pod.effective_units
    assert pod.full_below_units >= pod.capacity_units // 10, (
        "the guard is armed before a model of the default size fails"
    )


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[SpiRuntime]:
    runtime = SpiRuntime(tmp_path, RuntimeConfig(grace_s=0.2, engine=EngineConfig(slab_bytes=SLAB)))
    await runtime.server.start()
    yield runtime
    await runtime.server.stop(0)
    await runtime.models.close()
    await runtime.engine.stop(0.0)


async def test_spi_numbers_start_modelmesh(runtime: SpiRuntime) -> None:
    runtime.engine.start()
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        stub = ModelRuntimeStub(channel)
        await runtime.engine.wait_ready()
        pod = ModelMeshPod.of(await stub.runtimeStatus(pb.RuntimeStatusRequest()))
        assert pod.limits_concurrency
        assert pod.load_timeout_ms == 600_000
        assert pod.longest_wait_ms == 50 * 60_000
        loaded = await stub.loadModel(pb.LoadModelRequest(modelId="a", modelPath="/models/a", modelKey="{}"))
        assert pod.most_in_flight(loaded.maxConcurrency) >= 300
        assert pod.insertion_weight(loaded.sizeInBytes) <= pod.effective_units


@pytest.mark.parametrize("path", ["slow:hub", "slow:bucket", "missing:x", "/models/a"])
async def test_spi_predicts_a_weight_before_modelmesh_gives_up(runtime: SpiRuntime, path: str) -> None:
    """Of a source that is looked at slowly, one that is missing, and any while the engine has not started."""
    async with grpc.aio.insecure_channel(runtime.address) as channel:
        stub = ModelRuntimeStub(channel)
        for is_started in (False, True):
            if is_started:
                runtime.engine.start()
                await runtime.engine.wait_ready()
            started_s = time.monotonic()
            request = pb.PredictModelSizeRequest(modelId="a", modelPath=path, modelKey="{}")
            answers = await asyncio.gather(*(stub.predictModelSize(request, timeout=0.5) for _ in range(18)))
            assert time.monotonic() - started_s < 0.5
            assert {answer.sizeInBytes > 0 for answer in answers} == {True}
        pod = ModelMeshPod.of(await stub.runtimeStatus(pb.RuntimeStatusRequest()))
        assert pod.insertion_weight(answers[0].sizeInBytes) >= 1
