"""An engine that shares its device: it asks for slabs, uses those that it gets, and gives back what nothing uses."""

import math
from collections.abc import Iterator

import pytest

from common.model_state import Tier
from runtime.engine.interfaces import KvGeometry
from runtime.ipc.messages import DeviceShareFigures, EngineStats
from runtime.types import FinishReason
from tests.support.engine_stage import Answer, Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec

KV = KvGeometry(4, 4, 4, 1, 32, 64)  # 16 tokens a slab


@pytest.fixture
def made() -> Iterator[Stage]:
    """Two models of 4 slabs on a device of 32, none of which the engine holds."""
    specs = {name: FakeSpec(eos=(), kv=KV) for name in "ab"}
    stage = Stage(FakeBackend(specs, total_slabs=32, committed=0), shares_device=True)
    for name in "ab":
        stage.load(name)
    stage.turn(10)
    assert sorted(stage.loaded()) == ["a", "b"]
    yield stage
    stage.close()


def share(stage: Stage) -> DeviceShareFigures:
    figures = stage.stats().share
    assert figures is not None
    return figures


def tier(stage: Stage, name: str) -> Tier:
    return next(model.tier for model in stage.stats().models if model.model_id == name)


def answered(stage: Stage, name: str, num_tokens: int = 8) -> Answer:
    answer = stage.add(name, [5, 6], num_tokens)
    stage.until_quiet()
    stage.check_all()
    assert answer.finish is FinishReason.LENGTH
    return answer


def test_shared_device_memory_is_wanted_for_a_loaded_model_and_needed_for_a_request(made: Stage) -> None:
    assert (share(made).committed_slabs, share(made).needed_slabs, share(made).wanted_slabs) == (0, 0, 5)
    made.turn(500)
    assert share(made).wanted_slabs == 0  # nobody uses the models
    made.add("a", [5, 6], 8)
    sent_s = made.now
    made.turn(3)
    assert (share(made).needed_slabs, share(made).wanted_slabs, share(made).since_s) == (5, 7, sent_s)
    made.resize(1, 5)
    made.until_quiet()
    made.check_all()
    assert (share(made).committed_slabs, share(made).needed_slabs, share(made).last_resize) == (5, 0, 1)
    assert len(made.backend.committed) == 5


def test_shared_device_is_filled_by_a_loaded_model_if_memory_comes(made: Stage) -> None:
    made.resize(1, 5)
    made.turn(5)
    assert [tier(made, name) for name in "ab"].count(Tier.DEVICE) == 1


def test_shared_device_memory_is_not_taken_from_an_own_model_without_the_front(made: Stage) -> None:
    made.resize(1, 6)
    answered(made, "a")
    waiting = made.add("b", [7], 4)
    made.turn(50)
    assert (tier(made, "a"), waiting.finish) == (Tier.DEVICE, None)
    assert share(made).needed_slabs > 0
    made.resize(2, 6, "a")
    made.until_quiet()
    made.check_all()
    assert (tier(made, "a"), tier(made, "b")) == (Tier.DISK, Tier.DEVICE)


def test_shared_device_engine_that_holds_all_decides_alone(made: Stage) -> None:
    made.resize(1, 32)
    answered(made, "a")
    answered(made, "b")
    assert share(made).needed_slabs == share(made).wanted_slabs == 0


def test_resize_gives_back_what_nothing_uses(made: Stage) -> None:
    made.resize(1, 32)
    answered(made, "a", 40)
    assert share(made).idle_slabs == 3  # the cached prefix
    made.resize(2, 0)
    made.turn(2)
    assert (share(made).committed_slabs, share(made).last_resize) == (4 + 4, 2)  # the weights of both
    made.resize(3, 0, "a")
    made.turn(2)
    assert (share(made).committed_slabs, tier(made, "a"), tier(made, "b")) == (4, Tier.DISK, Tier.DEVICE)
    assert len(made.backend.committed) == 4


def test_resize_keeps_a_busy_model(made: Stage) -> None:
    made.resize(1, 12)
    answer = made.add("a", [5, 6], 60)
    made.turn(30)
    assert 0 < len(answer.tokens) < 60
    made.resize(2, 0, "a", "b")
    made.turn(2)
    assert (tier(made, "a"), tier(made, "b"), share(made).last_resize) == (Tier.DEVICE, Tier.DISK, 2)
    assert 5 <= share(made).committed_slabs <= 8  # its weights, and KV for what it is expected to write
    made.resize(3, 32)
    made.until_quiet()
    made.check_all()


def test_resize_drains_a_busy_model_and_its_queue_waits(made: Stage) -> None:
    made.resize(1, 12)
    running = made.add("a", [5, 6], 40)
    made.turn(30)
    assert 0 < len(running.tokens) < 40
    late = made.add("a", [9], 8)
    made.resize(2, 0, drain=True)
    made.turn(2)
    assert share(made).last_resize == 1
    made.turn(400)
    assert running.finish is FinishReason.LENGTH
    assert late.finish is None
    assert (share(made).committed_slabs, share(made).last_resize) == (0, 2)
    assert share(made).needed_slabs == 5  # for the request that came late
    made.resize(3, 12)
    made.until_quiet()
    made.check_all()


def test_resize_preempts_the_rows_of_a_model_that_drains_too_long(made: Stage) -> None:
    made.resize(1, 32)
    running = made.add("a", [5, 6], 190)
    made.turn(20)
    made.backend.token_us = 1.0
    made.turn_s = 1.0
    made.resize(2, 0, drain=True)
    made.turn(30)
    assert (share(made).committed_slabs, running.finish) == (0, None)
    made.resize(3, 32)
    made.until_quiet()
    made.check_all()


def test_resize_takes_what_the_driver_has(made: Stage) -> None:
    made.backend.obtainable_slabs = 4
    made.resize(1, 12)
    made.turn(3)
    assert (share(made).committed_slabs, share(made).last_resize) == (3, 1)  # half of half of 12
    made.backend.obtainable_slabs = 6
    made.resize(2, 6)
    answered(made, "a")
    assert share(made).committed_slabs == 6


def test_running_rows_want_more_slabs_before_they_lack_them(made: Stage) -> None:
    made.resize(1, 9)
    made.add("a", [5, 6], 100)
    wanted = 0
    for _ in range(100):
        made.turn()
        wanted = max(wanted, share(made).wanted_slabs)
    assert wanted > 0
    made.resize(2, 32)
    made.until_quiet()
    made.check_all()


def test_lack_of_running_rows_is_reported_when_it_changes_and_not_at_every_step(made: Stage) -> None:
    made.resize(1, 7)
    made.add("a", [5, 6], 40)
    made.turn(10)
    made.add("a", list(range(2, 46)), 3)
    made.events.clear()
    made.turn(25)
    lacks = [event.share for event in made.events if isinstance(event, EngineStats) and event.share is not None]
    assert {one.since_s for one in lacks if one.needed_slabs} == {math.inf}
    assert len(lacks) < 5
    made.resize(2, 32)
    made.until_quiet()
    made.check_all()
