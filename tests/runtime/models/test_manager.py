"""Lives of models over a real engine process that fakes only the tokens: order, sharing, cancelling, death, return, quarantine."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from common.model_key import ModelSettings
from runtime.config.schema import RuntimeConfig
from runtime.engine_client.groups import EngineGroups
from runtime.engine_client.placement import Wanted
from runtime.engine_client.restart_policy import RestartPolicy
from runtime.errors import Cancelled, DeadlineExceeded, LoadFailed, ModelNotFound, Overloaded, Quarantined, Unavailable
from runtime.ipc.messages import Load
from runtime.models.manager import Models
from runtime.models.model_state import Phase
from runtime.models.quarantine import Quarantine
from runtime.types import GenerationRequest, ModelFacts, ModelSource, SamplingParams, StopParams
from tests.support.engines import fake_command
from tests.support.fake_engine import KILL, STALL
from tests.support.preparers import ScriptedPreparer, no_text

FAST = RestartPolicy(first_s=0.01, most_s=0.05, start_timeout_s=20.0)
SOURCE = ModelSource("/models/a")
PLAIN = ModelSettings()


class House:
    def __init__(self, tmp_path: Path, config: RuntimeConfig, preparer: ScriptedPreparer, num_engines: int = 1) -> None:
        self.journal_path = tmp_path / "journal"
        self.engine = EngineGroups(
            [config.engine] * num_engines, command=fake_command(journal=self.journal_path), restart=FAST
        )
        self.preparer = preparer
        self.models = Models(config, self.engine, preparer, no_text)

    def journal(self, what: str) -> list[str]:
        text = self.journal_path.read_text() if self.journal_path.exists() else ""
        entries = [json.loads(line) for line in text.splitlines()]
        return [entry.get("model", "") for entry in entries if entry["what"] == what]

    async def generate(self, model_id: str, *prompt: int) -> list[int]:
        self.models.get(model_id)
        request = GenerationRequest(prompt=prompt, sampling=SamplingParams(), stop=StopParams(max_tokens=2))
        rows = self.engine.generate(model_id, request)
        return [token async for row in rows for token in row.tokens]

    def phase(self, model_id: str) -> Phase | None:
        return next((view.phase for view in self.models.views() if view.model_id == model_id), None)

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not done():
                await self.models.changes.wait(0.05)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(
        tmp_path, RuntimeConfig(load_timeout_s=5.0, grace_s=0.2, max_loading_concurrency=2), ScriptedPreparer(0.02)
    )
    house.engine.start()
    yield house
    await house.models.close()
    await house.engine.stop(0.0)


async def test_manager_load_is_shared_and_idempotent(house: House) -> None:
    served = await asyncio.gather(*(house.models.load("a", SOURCE, PLAIN) for _ in range(10)))
    assert house.preparer.started == 1
    assert {one.model_id for one in served} == {"a"}
    await house.models.load("a", SOURCE, PLAIN)
    assert house.preparer.started == 1
    assert await house.generate("a", 5) == [6, 6]
    assert [view.phase for view in house.models.views()] == [Phase.LOADED]


async def test_manager_loads_an_id_with_another_source_again(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    await house.models.load("a", ModelSource("/models/b"), PLAIN)
    assert house.preparer.started == 2
    assert house.preparer.held == 1
    assert house.journal("unload") == ["a"]


async def test_manager_loads_again_when_the_files_have_changed(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    house.preparer.files = "second"
    await asyncio.gather(*(house.models.load("a", SOURCE, PLAIN) for _ in range(3)))
    assert house.preparer.started == 2
    assert house.preparer.held == 1
    assert house.journal("unload") == ["a"]
    await house.models.load("a", SOURCE, PLAIN)
    assert house.preparer.started == 2


async def test_manager_loads_while_other_sources_hang(house: House) -> None:
    hanging = [
        asyncio.create_task(house.models.load(name, ModelSource(f"endless:{name}"), PLAIN)) for name in ("x", "y", "z")
    ]
    await house.until(lambda: house.preparer.started == 3)
    async with asyncio.timeout(2):
        await house.models.load("a", SOURCE, PLAIN)
        for name in ("x", "y", "z"):
            await house.models.unload(name, grace_s=0.2)
    assert all(isinstance(error, Cancelled) for error in await asyncio.gather(*hanging, return_exceptions=True))


async def test_manager_unload_releases_and_ignores_unknown_ids(house: House) -> None:
    await house.models.unload("nobody", grace_s=0.2)
    await house.models.load("a", SOURCE, PLAIN)
    await house.models.unload("a", grace_s=0.2)
    assert house.preparer.held == 0
    assert not house.models.views()
    with pytest.raises(ModelNotFound):
        house.models.get("a")


async def test_manager_unload_drains_within_the_grace(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    short = asyncio.create_task(house.generate("a", 5))
    endless = asyncio.create_task(house.generate("a", STALL))
    await house.until(lambda: house.engine.running("a") >= 1)
    unloading = asyncio.create_task(house.models.unload("a", grace_s=0.2))
    await asyncio.sleep(0)
    with pytest.raises(ModelNotFound):
        house.models.get("a")
    assert await short == [6, 6]
    with pytest.raises(Unavailable, match="unloaded"):
        await endless
    await unloading


async def test_manager_unload_without_grace_ends_running_requests(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    endless = asyncio.create_task(house.generate("a", STALL))
    await house.until(lambda: house.engine.running("a") == 1)
    await house.models.unload("a", grace_s=0.0)
    with pytest.raises(Unavailable, match="unloaded"):
        await endless


async def test_manager_cleans_up_after_a_failed_load(house: House) -> None:
    with pytest.raises(LoadFailed, match="no such files"):
        await house.models.load("a", ModelSource("missing:x"), PLAIN)
    assert house.phase("a") is Phase.FAILED
    with pytest.raises(Overloaded, match="10 bytes of 5"):
        await house.models.load("fail", SOURCE, PLAIN)
    assert house.preparer.held == 0
    await house.models.unload("fail", grace_s=0.2)
    await house.models.unload("a", grace_s=0.2)
    assert not house.models.views()
    await house.models.load("a", SOURCE, PLAIN)


async def test_manager_undoes_a_cancelled_load(house: House) -> None:
    loading = asyncio.create_task(house.models.load("slow", SOURCE, PLAIN))
    await house.until(lambda: house.journal("load") == ["slow"])
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await house.until(lambda: not house.models.views())
    assert house.preparer.held == 0
    assert house.journal("unload") == ["slow"]


async def test_manager_load_survives_one_of_two_waiters(house: House) -> None:
    leaver = asyncio.create_task(house.models.load("slow", SOURCE, PLAIN))
    stayer = asyncio.create_task(house.models.load("slow", SOURCE, PLAIN))
    await house.until(lambda: house.journal("load") == ["slow"])
    leaver.cancel()
    assert (await stayer).model_id == "slow"
    assert house.preparer.started == 1


async def test_manager_unload_cancels_a_load(house: House) -> None:
    first = asyncio.create_task(house.models.load("slow", SOURCE, PLAIN))
    await house.until(lambda: house.phase("slow") is Phase.LOADING)
    unloading = asyncio.create_task(house.models.unload("slow", grace_s=0.2))
    await asyncio.sleep(0)
    again = asyncio.create_task(house.models.load("slow", SOURCE, PLAIN))
    with pytest.raises(Cancelled):
        await first
    await unloading
    assert (await again).model_id == "slow"
    assert house.preparer.held == 1


async def test_manager_shutdown_does_not_blame_the_model_that_is_loading(house: House) -> None:
    loading = asyncio.create_task(house.models.load("slow", SOURCE, PLAIN))
    await house.until(lambda: house.phase("slow") is Phase.LOADING)
    await house.models.stop_loads()
    with pytest.raises(Unavailable, match="the runtime is shutting down") as caught:
        await loading
    assert caught.value.retry_after_s is not None


async def test_manager_undoes_a_load_at_its_timeout(tmp_path: Path) -> None:
    house = House(tmp_path, RuntimeConfig(load_timeout_s=0.3), ScriptedPreparer())
    house.engine.start()
    await house.engine.wait_ready()
    with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
        await house.models.load("a", ModelSource("endless:x"), PLAIN)
    assert not house.models.views()
    await house.models.close()
    await house.engine.stop(0.0)


async def test_manager_reports_progress(house: House) -> None:
    loading = asyncio.create_task(house.models.load("a", ModelSource("endless:x"), PLAIN))
    await house.until(lambda: any(view.progress is not None for view in house.models.views()))
    (view,) = house.models.views()
    assert view.progress is not None
    assert (view.progress.done_bytes, view.progress.total_bytes, view.progress.text) == (1, 4, "config.json")
    loading.cancel()


async def test_manager_runs_operations_in_order(house: House) -> None:
    draw = random.Random(7)
    for _ in range(6):
        tasks: list[asyncio.Task[object]] = []
        last = ""
        for _ in range(draw.randint(3, 9)):
            last = draw.choice(["load", "unload"])
            work = (
                house.models.load("slow", SOURCE, PLAIN) if last == "load" else house.models.unload("slow", grace_s=0.2)
            )
            tasks.append(asyncio.create_task(work))
            await asyncio.sleep(draw.choice([0.0, 0.0, 0.01]))
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (house.phase("slow") is Phase.LOADED) == (last == "load")
        assert house.preparer.held == (last == "load")


async def test_manager_reloads_models_after_an_engine_crash(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    await house.models.load("b", SOURCE, PLAIN)
    with pytest.raises(Unavailable):
        await house.generate("a", KILL)
    with pytest.raises(Unavailable, match="coming back"):
        house.models.get("b")
    await house.until(lambda: house.phase("a") is Phase.LOADED and house.phase("b") is Phase.LOADED)
    assert await house.generate("b", 5) == [6, 6]
    assert house.preparer.started == 2
    assert house.preparer.held == 2


async def test_manager_quarantines_a_model_after_two_crashes(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    await house.models.load("b", SOURCE, PLAIN)
    for _ in range(2):
        await house.until(lambda: house.phase("a") is Phase.LOADED)
        with pytest.raises(Unavailable):
            await house.generate("a", KILL)
    with pytest.raises(Quarantined, match="'a'"):
        house.models.get("a")
    with pytest.raises(Quarantined, match="'a'"):
        await house.models.load("a", SOURCE, PLAIN)
    await house.until(lambda: house.phase("b") is Phase.LOADED)
    assert await house.generate("b", 5) == [6, 6]
    # The mesh unloads after a failed load, which ends no quarantine.
    await house.models.unload("a", grace_s=0.2)
    assert house.phase("a") is Phase.QUARANTINED
    with pytest.raises(Quarantined, match="'a'"):
        await house.models.load("a", SOURCE, PLAIN)
    await house.models.unload("a", grace_s=0.2, allow_retry=True)
    await house.models.load("a", SOURCE, PLAIN)
    with pytest.raises(Unavailable):
        await house.generate("a", KILL)
    assert house.phase("a") is Phase.QUARANTINED


async def test_manager_keeps_a_quarantine_that_an_eviction_crosses(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    for _ in range(2):
        await house.until(lambda: house.phase("a") is Phase.LOADED)
        with pytest.raises(Unavailable):
            await house.generate("a", KILL)
    await house.models.unload("a", grace_s=0.2)
    with pytest.raises(Quarantined, match="'a'"):
        await house.models.load("a", SOURCE, PLAIN)


async def test_manager_retries_a_load_that_crashed_the_engine(house: House) -> None:
    with pytest.raises(Quarantined, match="deadly"):
        await house.models.load("deadly", SOURCE, PLAIN)
    assert house.journal("load") == ["deadly", "deadly"]
    await house.models.unload("deadly", grace_s=0.2)
    with pytest.raises(Quarantined):
        await house.models.load("deadly", SOURCE, PLAIN)
    assert house.journal("load") == ["deadly", "deadly"]
    await house.models.unload("deadly", grace_s=0.2, allow_retry=True)
    with pytest.raises(Quarantined):
        await house.models.load("deadly", SOURCE, PLAIN)
    assert house.journal("load") == ["deadly", "deadly", "deadly"]
    assert house.preparer.held == 0


class UnnoticedDeath(EngineGroups):
    """Refuses the first load as a client does whose engine has just closed the socket and is not yet known to be dead."""

    refusals = 1

    async def load(self, request: Load, wanted: Wanted, last_used_s: Mapping[str, float]) -> ModelFacts:
        if self.refusals:
            self.refusals -= 1
            raise Unavailable("the engine is ready; try again")
        return await super().load(request, wanted, last_used_s)


async def test_manager_load_survives_a_death_that_is_not_noticed_yet(tmp_path: Path) -> None:
    config = RuntimeConfig(load_timeout_s=5.0, grace_s=0.2)
    engine = UnnoticedDeath([config.engine], command=fake_command(), restart=FAST)
    models = Models(config, engine, ScriptedPreparer(), no_text)
    engine.start()
    assert (await models.load("a", SOURCE, PLAIN)).model_id == "a"
    assert engine.refusals == 0
    await models.close()
    await engine.stop(0.0)


async def test_manager_returns_the_models_of_the_engine_that_died(tmp_path: Path) -> None:
    """Those of another engine answer meanwhile."""
    house = House(tmp_path, RuntimeConfig(load_timeout_s=5.0, grace_s=0.2), ScriptedPreparer(), num_engines=2)
    house.engine.start()
    await house.models.load("a", SOURCE, PLAIN)
    await house.models.load("b", SOURCE, PLAIN)
    with pytest.raises(Unavailable):
        await house.generate("a", KILL)
    assert (house.phase("a"), house.phase("b")) == (Phase.RETURNING, Phase.LOADED)
    assert await house.generate("b", 5) == [6, 6]
    await house.until(lambda: house.phase("a") is Phase.LOADED)
    assert await house.generate("a", 5) == [6, 6]
    assert house.journal("load") == ["a", "b", "a"]
    await house.models.close()
    await house.engine.stop(0.0)


async def test_manager_refuses_a_size_that_no_group_has_before_it_pulls(house: House) -> None:
    with pytest.raises(
        LoadFailed, match="model wide: its tensor_parallel is 2, and the groups of devices here have sizes 1"
    ):
        await house.models.load("wide", SOURCE, ModelSettings(tensor_parallel=2))
    assert house.preparer.started == 0


async def test_manager_unloads_while_the_engine_restarts(house: House) -> None:
    await house.models.load("slow", SOURCE, PLAIN)
    await house.models.load("b", SOURCE, PLAIN)
    with pytest.raises(Unavailable):
        await house.generate("b", KILL)
    await house.models.unload("slow", grace_s=0.2)
    await house.until(lambda: house.phase("b") is Phase.LOADED)
    assert house.phase("slow") is None
    with pytest.raises(ModelNotFound):
        house.models.get("slow")


async def test_manager_purge_unloads_everything(house: House) -> None:
    await house.models.load("a", SOURCE, PLAIN)
    loading = asyncio.create_task(house.models.load("b", ModelSource("endless:x"), PLAIN))
    await house.until(lambda: house.phase("b") is not None)
    await house.models.purge()
    assert not house.models.views()
    assert house.preparer.held == 0
    with pytest.raises(Cancelled):
        await loading


def test_quarantine_splits_the_blame_between_two_models() -> None:
    quarantine = Quarantine()
    for _ in range(3):
        quarantine.strike([("a", b"1"), ("b", b"1")])
    assert not quarantine.holds("a", b"1")
    quarantine.strike([("a", b"1")])
    assert quarantine.holds("a", b"1")
    assert not quarantine.holds("a", b"2")
    assert not quarantine.holds("b", b"1")
