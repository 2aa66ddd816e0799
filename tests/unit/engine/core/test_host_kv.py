"""Saved KV in the engine loop, on the fake backend: a conversation returns to its blocks, and never to blocks of something else."""

import pytest

from common.model_state import ModelFigures, Tier
from runtime.engine.interfaces import KvGeometry
from runtime.ipc.messages import Load, LoadFailed
from runtime.types import Checkpoint
from tests.support.engine_stage import Answer, Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeAdapterSpec, FakeSpec

KV = KvGeometry(4, 4, 8, 2, 256, 64)
PROMPT = [5 + number % 30 for number in range(41)]


def stage_of(*, host_kv_slabs: int = 8, host_slabs: int = 0, weight_slabs: int = 5, swap_polls: int = 3) -> Stage:
    """Models a, b and c, of which the device holds one with a conversation of 41 tokens. To compute it takes two milliseconds, and to copy the weights a third of one."""
    specs = {name: FakeSpec(weight_slabs, kv=KV, eos=(), max_model_len=64, swap_polls=swap_polls) for name in "abc"}
    backend = FakeBackend(specs, total_slabs=weight_slabs + 4, host_kv_slabs=host_kv_slabs, host_slabs=host_slabs)
    backend.token_us = 50.0
    stage = Stage(backend, turn_s=1e-4)
    for name in "ab":
        stage.load(name)
    stage.until_quiet()
    assert sorted(stage.loaded()) == ["a", "b"]
    return stage


def ask(stage: Stage, model_id: str, prompt: list[int] = PROMPT) -> Answer:
    answer = stage.add(model_id, prompt, 4)
    stage.until_quiet()
    return answer


def figures_of(stage: Stage, model_id: str) -> ModelFigures:
    return next(figures for figures in stage.stats().models if figures.model_id == model_id)


@pytest.mark.parametrize(("host_kv_slabs", "cached"), [(8, 40), (2, 32), (0, 0)])
def test_conversation_returns_to_what_fits_the_budget(host_kv_slabs: int, cached: int) -> None:
    stage = stage_of(host_kv_slabs=host_kv_slabs)
    ask(stage, "a")
    ask(stage, "b", [7])
    ask(stage, "b", PROMPT)  # takes the slabs of a's prefix
    assert figures_of(stage, "a").tier is Tier.DISK
    assert figures_of(stage, "a").kv_host_bytes <= host_kv_slabs * stage.backend.slab_bytes
    stage.backend.largest_step = 0
    assert ask(stage, "a").cached_tokens == cached
    assert stage.backend.largest_step == len(PROMPT) - cached
    figures = figures_of(stage, "a")
    assert figures.kv_restored_blocks_total == cached // 4
    assert figures.kv_saved_blocks_total - figures.kv_dropped_blocks_total >= cached // 4
    assert figures.prefix_hit_tokens_total == cached
    stage.check_all()
    stage.close()


def test_conversation_is_computed_again_behind_slow_weights() -> None:
    """Copying the weights hides what the conversation costs to compute. Once they are on the device, its KV comes back."""
    stage = stage_of(swap_polls=200)
    ask(stage, "a")
    ask(stage, "b")
    assert ask(stage, "a").cached_tokens == 0
    assert figures_of(stage, "a").kv_restored_blocks_total == 0
    ask(stage, "b")
    ask(stage, "a", [9])
    stage.turn(250)  # until the last byte is there
    assert ask(stage, "a").cached_tokens == 40
    assert figures_of(stage, "a").kv_restored_blocks_total == 10
    stage.check_all()
    stage.close()


def test_loaded_again_model_starts_without_saved_blocks() -> None:
    """Its files may have changed in between."""
    stage = stage_of()
    ask(stage, "a")
    ask(stage, "b")
    assert figures_of(stage, "a").kv_host_bytes > 0
    stage.unload("a")
    stage.load("a")
    stage.until_quiet()
    assert figures_of(stage, "a").kv_host_bytes == 0
    assert ask(stage, "a").cached_tokens == 0
    stage.check_all()
    stage.close()


def test_saved_blocks_of_one_adapter_are_no_other_ones() -> None:
    stage = stage_of()
    for name in ("x", "y"):
        stage.backend.adapters[name] = FakeAdapterSpec("a", f"content of {name}", size_bytes=100)
        stage.load_adapter(name)
    stage.until_quiet()
    assert not stage.of(LoadFailed)
    prompt = PROMPT[:21]
    ask(stage, "x", prompt)
    ask(stage, "b")
    assert figures_of(stage, "a").kv_saved_blocks_total > 0
    for name, cached in (("y", 0), ("a", 0), ("x", 20)):
        answer = ask(stage, name, prompt)
        assert answer.last is not None
        assert (answer.cached_tokens, answer.last.error) == (cached, None), name
    stage.check_all()
    stage.close()


def test_failed_step_drops_saved_blocks() -> None:
    """The blocks may have been saved while the step that fills them was in flight."""
    stage = stage_of()
    ask(stage, "a")
    ask(stage, "b")
    assert figures_of(stage, "a").kv_host_bytes > 0
    stage.backend.faults["a"] = "collect"
    stage.add("a", [9], 2)
    stage.until_quiet()
    assert figures_of(stage, "a").kv_host_bytes == 0
    assert ask(stage, "a").cached_tokens == 0
    stage.check_all()
    stage.close()


def test_weights_take_the_host_memory_of_saved_blocks() -> None:
    """Host memory for two models and two slabs: a third model is kept there, at the cost of the saved blocks first and of weights then."""
    stage = stage_of(host_slabs=12, weight_slabs=5)
    ask(stage, "a")
    ask(stage, "b")
    assert figures_of(stage, "a").kv_host_bytes == 2 * stage.backend.slab_bytes, "two of three slabs find room"
    stage.inbox.put(Load("c", Checkpoint("c", weight_bytes=5 * stage.backend.slab_bytes)))
    stage.until_quiet()
    assert sorted(stage.loaded()) == ["a", "b", "c"]
    assert figures_of(stage, "a").kv_host_bytes == 0
    assert sorted(memory.host_bytes() > 0 for memory in stage.backend.memories) == [False, True, True]
    assert stage.stats().host_used_bytes == 10 * stage.backend.slab_bytes
    ask(stage, "a")
    stage.check_all()
    stage.close()


def test_saved_blocks_take_no_host_memory_during_a_load() -> None:
    stage = stage_of(host_slabs=20, weight_slabs=5)
    ask(stage, "a")
    stage.backend.specs["c"].load_polls = 10_000
    stage.load("c")
    stage.turn(3)
    answer = stage.add("b", PROMPT, 4)
    while answer.last is None:
        stage.turn()
    assert figures_of(stage, "a").kv_saved_blocks_total == 0
    stage.unload("c")
    stage.until_quiet()
    stage.close()
