"""Groups of devices that are groups of their own: started when a model needs them, counted once per device."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.config.schema import EngineConfig
from runtime.engine_client.client import CommandBuilder
from runtime.engine_client.engine_group import EngineGroup, device_figures
from runtime.engine_client.group_plan import plan_shared_groups, share_devices
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.placement import Wanted
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.errors import Unavailable
from runtime.ipc.messages import Load
from runtime.models.capacity import budgets_of, capacity_of
from runtime.types import Checkpoint, GenerationRequest, ModelFacts, SamplingParams, StopParams
from tests.support.engines import RecordingListener, fake_command
from tests.support.fake_engine import BUDGET_BYTES

FAST = RestartPolicy(first_s=0.01, most_s=0.05, start_timeout_s=20.0, max_failed_starts=3, max_first_starts=1)


@asynccontextmanager
async def running(command: CommandBuilder, idle_s: float = 600.0) -> AsyncIterator[EngineGroups]:
    """Two groups of one device, and one of both. The fake engines hold all that they load."""
    homes = [EngineConfig(device="cpu")] * 2
    shared = plan_shared_groups(homes, ((2,),))
    groups = EngineGroups(homes, shared=shared, command=command, restart=FAST, idle_s=idle_s)
    groups.listen(RecordingListener())
    groups.start()
    await groups.wait_ready()
    yield groups
    await groups.stop(0.0)


async def load(groups: EngineGroups, model_id: str, weight_bytes: int, wanted: Wanted = "auto") -> ModelFacts:
    request = Load(model_id, Checkpoint(model_dir="/nowhere", weight_bytes=weight_bytes))
    return await groups.load(request, wanted, {})


async def text(groups: EngineGroups, model_id: str) -> list[int]:
    request = GenerationRequest(prompt=(5,), sampling=SamplingParams(temperature=0.0), stop=StopParams(2))
    return [token async for row in groups.generate(model_id, request) for token in row.tokens]


def group_of(groups: EngineGroups, model_id: str) -> EngineGroup:
    [group] = [group for group in groups.groups if model_id in group.models]
    return group


async def test_shared_group_starts_with_the_first_model_that_needs_it(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with running(fake_command(journal=journal)) as groups:
        assert groups.sizes == (1, 1, 2)
        assert [group.devices for group in groups.groups] == [("cpu:0",), ("cpu:1",), ("cpu:0", "cpu:1")]
        assert [group.is_shared for group in groups.groups] == [False, False, True]
        await load(groups, "small", BUDGET_BYTES)
        assert journal.read_text().count("start") == 2
        facts = await asyncio.gather(load(groups, "large", 2 * BUDGET_BYTES), load(groups, "asked", 1000, wanted=2))
        assert [fact.num_devices for fact in facts] == [2, 2]
        assert journal.read_text().count("start") == 3
        assert group_of(groups, "large").devices == group_of(groups, "asked").devices == ("cpu:0", "cpu:1")
        assert await text(groups, "large") == [6, 6]
        assert groups.figures()["asked"].weight_bytes == 1000


async def test_shared_group_counts_no_device_twice() -> None:
    async with running(fake_command()) as groups:
        before = capacity_of("none", groups.groups, 0).capacity_bytes
        assert before == 2 * BUDGET_BYTES
        assert budgets_of(groups.groups) == {1: BUDGET_BYTES, 2: BUDGET_BYTES}
        await load(groups, "one", 30_000, wanted=1)
        await load(groups, "pair", 20_000, wanted=2)
        assert capacity_of("none", groups.groups, 0).capacity_bytes == before
        devices = device_figures(groups.groups)
        assert [(device.name, device.group, device.used_bytes, device.num_engines) for device in devices] == [
            ("cpu:0", "cpu:0", 40_000, 2),
            ("cpu:1", "cpu:1", 10_000, 2),
        ]
        assert sum(device.used_bytes for device in devices) == sum(
            model.device_bytes for model in groups.figures().values()
        )
        rooms = group_of(groups, "pair").rooms({})
        assert [room.free_bytes for room in rooms] == [BUDGET_BYTES - 40_000, BUDGET_BYTES - 10_000]
        assert [[one.model_id for one in room.residents] for room in rooms] == [["pair", "one"], ["pair"]]
        [room] = group_of(groups, "one").rooms({}, leave_out="one")
        assert [one.model_id for one in room.residents] == ["pair"]


async def test_single_models_avoid_a_device_that_a_shared_group_fills() -> None:
    async with running(fake_command()) as groups:
        await load(groups, "one", 10_000, wanted=1)
        first = group_of(groups, "one").devices
        await load(groups, "pair", 20_000, wanted=2)
        await load(groups, "two", 5_000, wanted=1)
        assert group_of(groups, "two").devices != first


async def test_shared_group_that_cannot_start_fails_its_load_only() -> None:
    sound, stillborn = fake_command(), fake_command(stillborn=True)
    fails = [True]

    def build(socket_path: Path, config: EngineConfig, crash_marker_path: Path) -> list[str]:
        command = stillborn if config.tensor_parallel == 2 and fails[0] else sound
        return command(socket_path, config, crash_marker_path)

    async with running(build) as groups:
        with pytest.raises(Unavailable, match="exited with code 3"):
            await load(groups, "pair", 1000, wanted=2)
        assert groups.state is EngineState.READY
        await load(groups, "one", 1000, wanted=1)
        assert await text(groups, "one") == [6, 6]
        fails[0] = False
        assert (await load(groups, "pair", 1000, wanted=2)).num_devices == 2


def test_share_devices_marks_only_those_of_shared_groups() -> None:
    homes = [EngineConfig(device=f"cuda:{number}") for number in range(3)]
    shared = plan_shared_groups(homes, ())
    assert [home.shares_device for home in share_devices(homes, shared)] == [True, True, False]


async def test_budget_of_a_shared_group_is_without_what_other_shared_groups_take() -> None:
    homes = [EngineConfig(device="cpu")] * 4
    shared = [replace(group, overhead_bytes=10_000) for group in plan_shared_groups(homes, ((2, 2), (4,)))]
    groups = EngineGroups(share_devices(homes, shared), shared=shared, command=fake_command(), restart=FAST)
    groups.start()
    await groups.wait_ready()
    assert budgets_of(groups.groups) == {1: BUDGET_BYTES, 2: BUDGET_BYTES - 10_000, 4: BUDGET_BYTES - 10_000}
    await load(groups, "pair", 1000, wanted=2)
    assert [group.hello.device_budget_bytes for group in groups.groups] == [
        *(BUDGET_BYTES - 10_000, BUDGET_BYTES - 10_000, BUDGET_BYTES, BUDGET_BYTES),
        *(BUDGET_BYTES - 10_000, BUDGET_BYTES - 10_000),
        BUDGET_BYTES - 20_000,
    ]
    await groups.stop(0.0)


async def test_engine_of_a_shared_group_without_models_ends_and_starts_again(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with running(fake_command(journal=journal), idle_s=0.1) as groups, asyncio.timeout(20):
        for number in range(2):
            await load(groups, "pair", 1000, wanted=2)
            assert await text(groups, "pair") == [6, 6]
            assert journal.read_text().count("start") == 3 + number
            await groups.unload("pair")
            while groups.groups[2].state is not EngineState.STARTING:
                assert groups.state is EngineState.READY
                await groups.changes.wait()
            assert groups.groups[2].stats is None
        await load(groups, "one", 1000, wanted=1)
        assert await text(groups, "one") == [6, 6]


async def test_engine_of_a_shared_group_is_kept_for_a_load_that_comes_while_it_is_idle(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    async with running(fake_command(journal=journal, load_s=0.6), idle_s=0.3) as groups, asyncio.timeout(20):
        await load(groups, "pair", 1000, wanted=2)
        await groups.unload("pair")
        await load(groups, "other", 1000, wanted=2)  # takes longer than an engine stays idle
        assert await text(groups, "other") == [6, 6]
        assert journal.read_text().count("start") == 3
