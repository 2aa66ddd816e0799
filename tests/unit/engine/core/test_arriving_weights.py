"""Steps of a model whose weights are being copied to the device: when they are launched, and what their duration says."""

from common.model_state import Tier
from tests.support.engine_stage import Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec

PROMPT = [5 + number % 30 for number in range(41)]
TURN_S = 1e-4


def stage_of(*, swap_polls: int, host_slabs: int = 0) -> Stage:
    """Models a and b, of which the device holds one. Each has been swapped in before, in `swap_polls` turns."""
    specs = {name: FakeSpec(5, eos=(), max_model_len=64, swap_polls=swap_polls) for name in "ab"}
    stage = Stage(FakeBackend(specs, total_slabs=9, host_slabs=host_slabs), turn_s=TURN_S)
    for name in specs:
        stage.load(name)
    stage.until_quiet()
    assert sorted(stage.loaded()) == ["a", "b"]
    for name in ("b", "a"):
        ask(stage, name, [9])
        stage.turn(swap_polls + 10)
    return stage


def ask(stage: Stage, model_id: str, prompt: list[int]) -> None:
    answer = stage.add(model_id, prompt, 4)
    stage.until_quiet()
    assert answer.last is not None
    assert answer.last.error is None


def test_step_is_launched_shortly_before_the_last_byte_arrives() -> None:
    """A step that waited longer would delay the steps of models that get requests meanwhile."""
    stage = stage_of(swap_polls=2000)  # 0.2 s
    answer = stage.add("b", PROMPT, 4)
    stage.turn()
    before = stage.backend.steps
    stage.turn(1300)
    assert stage.backend.steps == before
    stage.turn(500)
    assert answer.tokens, "its first step was not launched 20 ms before the last byte"
    stage.until_quiet()
    stage.check_all()
    stage.close()


def test_longer_step_is_launched_earlier() -> None:
    stage = stage_of(swap_polls=2000)
    model = stage.loop.table.models["b"]
    for _ in range(100):
        model.cost.observe(41, 0, 20_000.0)
    assert model.cost.predict_us(41, 0) > 8000
    answer = stage.add("b", PROMPT, 4)
    stage.turn()
    due = 2000 - 500 - round(model.cost.predict_us(41, 0) * 1e-6 / TURN_S)
    stage.turn(due - 20)
    assert not answer.tokens
    stage.turn(40)
    assert answer.tokens
    stage.close()


def test_step_that_waited_for_weights_teaches_nothing_about_computing() -> None:
    """Else a model that is called rarely would seem slow to compute."""
    stage = stage_of(swap_polls=200)  # 20 ms
    model = stage.loop.table.models["b"]
    before_us = model.cost.predict_us(41, 0)
    stage.backend.token_us = 450.0
    ask(stage, "b", PROMPT)
    assert model.cost.largest_tokens == 1
    assert model.cost.predict_us(41, 0) < before_us + 1000
    stage.backend.token_us = 4500.0
    ask(stage, "a", [9])
    ask(stage, "b", [*PROMPT[:20], *PROMPT])
    assert model.cost.largest_tokens == 61, "it computed for longer than its weights took"
    stage.close()


def test_return_from_disk_counts_as_one_though_the_copy_stays_in_host_memory() -> None:
    stage = stage_of(swap_polls=3, host_slabs=6)
    tiers = {name: set(stage.loop.table.models[name].swap_seconds) for name in "ab"}
    assert Tier.DISK in tiers["b"]
    stage.close()
