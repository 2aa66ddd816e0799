"""Several engines behind one object: models are spread, counted in all, and die with their own engine only."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from runtime.config.schema import EngineConfig
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.placement import Wanted
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.errors import LoadFailed, ModelNotFound, ModelTooLarge, Unavailable
from runtime.ipc.messages import Load
from runtime.types import Checkpoint, GenerationRequest, ModelFacts, SamplingParams, StopParams
from tests.support.engines import RecordingListener, fake_command
from tests.support.fake_engine import BUDGET_BYTES, KILL

FAST = RestartPolicy(first_s=0.01, most_s=0.05, start_timeout_s=20.0, max_failed_starts=3)


@asynccontextmanager
async def running(*sizes: int) -> AsyncIterator[tuple[EngineGroups, RecordingListener]]:
    configs = [EngineConfig(device="cpu", tensor_parallel=size) for size in sizes]
    groups, listener = EngineGroups(configs, command=fake_command(), restart=FAST), RecordingListener()
    groups.listen(listener)
    groups.start()
    await groups.wait_ready()
    yield groups, listener
    await groups.stop(0.0)


async def load(
    groups: EngineGroups, model_id: str, weight_bytes: int, wanted: Wanted = "auto", base: str = ""
) -> ModelFacts:
    request = Load(model_id, Checkpoint(model_dir="/nowhere", weight_bytes=weight_bytes), adapter_of=base)
    return await groups.load(request, wanted, {})


async def collect(groups: EngineGroups, model_id: str, *prompt: int) -> list[int]:
    request = GenerationRequest(prompt=prompt, sampling=SamplingParams(temperature=0.0), stop=StopParams(4))
    return [token async for row in groups.generate(model_id, request) for token in row.tokens]


def places(groups: EngineGroups) -> list[set[str]]:
    return [set(group.models) for group in groups.groups]


async def test_engine_groups_spread_models_and_add_up() -> None:
    async with running(1, 1) as (groups, _):
        await asyncio.gather(*(load(groups, name, 30_000) for name in "abcd"))
        assert [len(held) for held in places(groups)] == [2, 2]
        assert set().union(*places(groups)) == set("abcd")
        assert await collect(groups, "a", 5, 7) == [6, 8, 6, 8]
        assert set(groups.figures()) == set("abcd")
        assert [group.devices for group in groups.groups] == [("cpu:0",), ("cpu:1",)]
        in_all = sum(model.device_bytes for model in groups.figures().values())
        assert in_all == sum(group.stats.device_used_bytes for group in groups.groups if group.stats) == 120_000
        await groups.unload("a")
        with pytest.raises(ModelNotFound):
            await collect(groups, "a", 5)


async def test_engine_groups_take_the_least_devices_that_hold_a_model() -> None:
    async with running(2, 1, 1) as (groups, _):
        assert (await load(groups, "small", BUDGET_BYTES)).num_devices == 1
        assert (await load(groups, "large", 2 * BUDGET_BYTES)).num_devices == 2
        assert (await load(groups, "asked", 1000, wanted=2)).num_devices == 2
        assert places(groups)[0] == {"large", "asked"}
        assert groups.figures()["large"].weight_bytes == 2 * BUDGET_BYTES
        with pytest.raises(ModelTooLarge, match="it needs 100001 bytes"):
            await load(groups, "huge", 2 * BUDGET_BYTES + 2)
        with pytest.raises(ModelTooLarge):
            await load(groups, "single", BUDGET_BYTES + 1, wanted=1)
        assert places(groups)[0] == {"large", "asked"}


async def test_engine_groups_try_a_larger_group_when_an_engine_refuses() -> None:
    """The fake engine counts weights of 0 bytes as more than the smaller budget, which nothing but a try shows."""
    configs = [
        EngineConfig(device="cpu", device_budget_bytes=500),
        EngineConfig(device="cpu", device_budget_bytes=500),
        EngineConfig(device="cpu", tensor_parallel=2),
    ]
    groups = EngineGroups(configs, command=fake_command(), restart=FAST)
    groups.start()
    await groups.wait_ready()
    assert (await load(groups, "unsized", 0)).num_devices == 2
    assert places(groups) == [set(), set(), {"unsized"}]
    await groups.stop(0.0)


async def test_engine_groups_refuse_a_size_that_none_has() -> None:
    async with running(1, 1, 2) as (groups, _):
        with pytest.raises(
            LoadFailed, match=r"its tensor_parallel is 4, and the groups of devices here have sizes 1, 1, 2"
        ):
            await load(groups, "a", 10, wanted=4)


async def test_engine_groups_load_an_adapter_beside_its_base() -> None:
    async with running(1, 1) as (groups, _):
        await load(groups, "base", 90_000)
        await load(groups, "other", 10_000)
        await load(groups, "adapter", 10, base="base")
        assert {"base", "adapter"} in places(groups)
        with pytest.raises(LoadFailed, match="its base gone is not loaded here"):
            await load(groups, "lonely", 10, base="gone")


async def test_engine_groups_lose_only_the_models_of_the_engine_that_dies() -> None:
    async with running(1, 1) as (groups, listener):
        await load(groups, "a", 10_000)
        await load(groups, "b", 10_000)
        assert places(groups) == [{"a"}, {"b"}]
        with pytest.raises(Unavailable, match="the engine of group 0 was killed by SIGKILL"):
            await collect(groups, "a", KILL)
        assert await collect(groups, "b", 5) == [6, 6, 6, 6]
        assert groups.state is EngineState.READY
        assert [death.models for death in listener.deaths] == [{"a"}]
        await groups.wait_ready("a")
        assert listener.readied[-1] == {"a"}
        assert groups.restarts == 1
        await load(groups, "a", 10_000)
        assert places(groups) == [{"a"}, {"b"}]
        assert await collect(groups, "a", 5) == [6, 6, 6, 6]
