"""Adapters in the engine loop, on the fake backend: texts, residency, memory, prefixes, and what becomes of them when they or their base go."""

import pytest

from runtime.engine.interfaces import KvGeometry
from runtime.engine.operations import Operation, RunStep
from runtime.ipc.messages import LoadFailed
from runtime.types import FinishReason
from tests.support.engine_stage import Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeAdapterSpec, FakeSpec
from tests.support.random_life import run_life, seeds_of_long_runs

KV = KvGeometry(4, 4, 8, 2, 256, 64)
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def stage_of(
    num_adapters: int = 3, *, slots: int = 4, size_bytes: int = 5000, total_slabs: int = 32, **config: object
) -> Stage:
    """A loaded base with loaded adapters a0, a1, …"""
    backend = FakeBackend({"base": FakeSpec(kv=KV, eos=())}, total_slabs=total_slabs)
    backend.adapter_slots = slots
    for number in range(num_adapters):
        backend.adapters[f"a{number}"] = FakeAdapterSpec("base", f"content {number}", size_bytes)
    stage = Stage(backend, **config)  # type: ignore[arg-type]
    stage.load("base")
    stage.until_quiet()
    for name in backend.adapters:
        stage.load_adapter(name)
    stage.until_quiet()
    assert stage.loaded() == ["base", *backend.adapters]
    return stage


def resident(stage: Stage) -> set[str]:
    return {figures.model_id for figures in stage.stats().models if figures.device_bytes and figures.model_id != "base"}


def test_adapters_and_rows_without_share_a_batch() -> None:
    stage = stage_of()
    answers = [stage.add(name, PROMPT[:n]) for n, name in enumerate(("base", "a0", "a1", "a2", "a0", "base"), 1)]
    before = stage.backend.steps
    stage.until_quiet()
    stage.check_all()
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)
    assert stage.backend.steps - before < 25, "the rows ran together"
    stage.close()


def test_steps_without_adapters_are_planned_as_if_there_were_none() -> None:
    """So that they run the graphs of the base alone, although adapters are on the device and have requests that wait or have ended."""
    steps: list[RunStep] = []

    def record(operation: Operation) -> None:
        if isinstance(operation, RunStep):
            steps.append(operation)

    stage = stage_of(record=record)
    for name in ("a0", "a1"):
        stage.add(name, PROMPT, 4)
        stage.until_quiet()
    assert all(step.plan.adapters for step in steps)
    steps.clear()
    stage.add("base", PROMPT, 20)
    stage.until_quiet()
    assert len(steps) >= 20
    assert not any(step.plan.adapters for step in steps)
    stage.add("base", PROMPT, 20)
    stage.add("a0", PROMPT, 5)
    steps.clear()
    stage.until_quiet()
    mixed = [len(step.plan.adapters) for step in steps]
    assert mixed[0] > 0
    assert mixed[-1] == 0, "the base's row goes on alone, without adapters"
    stage.close()


def test_adapter_steps_are_charged_to_the_base() -> None:
    """Two bases with as many requests share the device by its time, although the steps of one take twice as long for its adapters."""
    spec = FakeSpec(kv=KV, max_model_len=1000, eos=())
    backend = FakeBackend({"base": spec, "other": spec}, total_slabs=128)
    backend.adapters["a0"] = FakeAdapterSpec("base", "content", 5000)
    backend.adapter_us = 200.0
    stage = Stage(backend, turn_s=0.001, quantum_us=2000)
    for name in ("base", "other"):
        stage.load(name)
    stage.until_quiet()
    stage.load_adapter("a0")
    stage.until_quiet()
    for name in ("a0", "other"):
        stage.add(name, PROMPT, 400, ignore_eos=True)
    stage.turn(300)
    seconds = {figures.model_id: figures.step_seconds_total for figures in stage.stats().models}
    assert seconds["base"] == pytest.approx(seconds["other"], rel=0.2)
    cost = stage.loop.table.models["base"].cost
    assert cost.predict_us(1, 20, 1) == pytest.approx(302, rel=0.1)
    stage.close()


def test_prefixes_are_shared_within_an_adapter_only() -> None:
    stage = stage_of(2)
    for name, cached in (("a0", 0), ("a0", 8), ("a1", 0), ("base", 0), ("a1", 8), ("base", 8)):
        answer = stage.add(name, PROMPT)
        stage.until_quiet()
        assert answer.cached_tokens == cached, name
    stage.check_all()
    stage.close()


def test_adapter_with_new_files_never_meets_old_kv() -> None:
    stage = stage_of(1)
    stage.add("a0", PROMPT)
    stage.until_quiet()
    stage.check_all()
    old = stage.answers.copy()
    stage.answers.clear()
    stage.backend.adapters["a0"].content = "other content"
    stage.load_adapter("a0")
    stage.until_quiet()
    answer = stage.add("a0", PROMPT)
    stage.until_quiet()
    assert answer.cached_tokens == 0
    stage.check_all()
    assert answer.tokens != next(iter(old.values())).tokens
    stage.close()


def test_adapter_that_returns_with_equal_files_finds_its_prefixes() -> None:
    stage = stage_of(1)
    stage.add("a0", PROMPT)
    stage.until_quiet()
    stage.unload("a0")
    stage.load_adapter("a0")
    stage.until_quiet()
    answer = stage.add("a0", PROMPT)
    stage.until_quiet()
    assert answer.cached_tokens == 8
    stage.close()


def test_adapters_beyond_the_slots_take_turns() -> None:
    stage = stage_of(7, slots=2)
    for _ in range(3):
        for name in stage.backend.adapters:
            stage.add(name, PROMPT, 6)
    stage.until_quiet()
    stage.check_all()
    assert len(resident(stage)) == 2
    stage.close()


def test_adapter_least_recently_used_is_evicted() -> None:
    stage = stage_of(3, slots=2)
    for name in ("a0", "a1", "a0", "a2"):
        stage.add(name, PROMPT)
        stage.until_quiet()
    assert resident(stage) == {"a0", "a2"}
    stage.close()


def test_adapter_in_use_stays_and_the_others_wait() -> None:
    stage = stage_of(2, slots=1)
    long = stage.add("a0", PROMPT, 150)
    stage.turn(20)
    short = stage.add("a1", PROMPT, 2)
    stage.turn(30)
    assert long.finish is None
    assert short.tokens == []
    assert resident(stage) == {"a0"}
    stage.until_quiet()
    stage.check_all()
    stage.close()


def test_steady_traffic_of_one_adapter_does_not_starve_another() -> None:
    """The only slot is always in use by a0; a1 gets its turn once its patience is over."""
    stage = stage_of(2, slots=1, turn_s=0.05)
    waiting = stage.add("a1", PROMPT, 2)
    for _ in range(400):
        if sum(answer.last is None for answer in stage.answers.values()) < 4:
            stage.add("a0", PROMPT, 30)
        stage.turn()
        if waiting.finish is not None:
            break
    assert waiting.finish is FinishReason.LENGTH
    stage.until_quiet()
    stage.check_all()
    stage.close()


def test_requests_behind_one_that_waits_for_its_adapter_run() -> None:
    stage = stage_of(1)
    stage.backend.adapters["slow"] = FakeAdapterSpec("base", "slow", swap_polls=10_000)
    stage.load_adapter("slow")
    stage.turn(10)
    blocked = stage.add("slow", PROMPT, 2)
    others = [stage.add(name, PROMPT, 2) for name in ("base", "a0")]
    stage.turn(30)
    assert [answer.finish for answer in (blocked, *others)] == [None, FinishReason.LENGTH, FinishReason.LENGTH]
    stage.abort(blocked.add.request_id)
    stage.until_quiet()
    stage.close()


def test_adapters_leave_for_the_weights_and_kv_of_other_models() -> None:
    backend = FakeBackend({"base": FakeSpec(9, kv=KV), "other": FakeSpec(9, kv=KV)}, total_slabs=24)
    for number in range(3):
        backend.adapters[f"a{number}"] = FakeAdapterSpec("base", f"content {number}", 4 * backend.slab_bytes)
    stage = Stage(backend)
    stage.load("base")
    stage.load("other")
    stage.until_quiet()
    for name in backend.adapters:
        stage.load_adapter(name)
    stage.until_quiet()
    for name in ("a0", "a1", "other", "a2", "base", "other", "a0"):
        answer = stage.add(name, PROMPT, 40, ignore_eos=True)
        stage.until_quiet()
        assert answer.finish is FinishReason.LENGTH
    stage.check_all()
    assert sum(figures.evictions_total for figures in stage.stats().models if figures.model_id[0] == "a") > 0
    stage.close()


def test_slabs_of_adapters_are_counted_to_the_byte() -> None:
    stage = stage_of(4, size_bytes=1024)
    for name in stage.backend.adapters:
        stage.add(name, PROMPT, 2)
    stage.until_quiet()
    lent = stage.loop.table.slabs.lent("base/adapters")
    assert lent == 1, "four adapters of a quarter of a slab share one"
    assert sum(f.device_bytes for f in stage.stats().models if f.model_id != "base") == 4096
    stage.close()


def test_adapter_without_its_base_is_refused() -> None:
    backend = FakeBackend({"base": FakeSpec(kv=KV)})
    backend.adapters["a0"] = FakeAdapterSpec("base", "x")
    stage = Stage(backend)
    stage.load_adapter("a0")
    stage.until_quiet()
    assert [(f.model_id, f.code, f.message) for f in stage.failures()] == [
        ("a0", "FAILED_PRECONDITION", "its base base is not loaded here")
    ]
    stage.close()


def test_adapter_that_could_never_fit_is_refused() -> None:
    backend = FakeBackend({"base": FakeSpec(kv=KV)}, total_slabs=18)
    backend.adapters["a0"] = FakeAdapterSpec("base", "x", 13 * backend.slab_bytes)
    stage = Stage(backend)
    stage.load("base")
    stage.load_adapter("a0")
    stage.until_quiet()
    stage.load_adapter("a0")
    stage.until_quiet()
    assert "exceed the device budget of 73728 bytes" in stage.failures()[-1].message
    stage.close()


def test_unloading_the_base_ends_its_adapters() -> None:
    stage = stage_of(2)
    answers = [stage.add(name, PROMPT, 150) for name in ("a0", "base")]
    stage.turn(20)
    stage.unload("base")
    stage.until_quiet()
    assert [answer.finish for answer in answers] == [FinishReason.ABORTED, FinishReason.ABORTED]
    assert {f.model_id: f.message for f in stage.of(LoadFailed)} == {  # type: ignore[union-attr]
        "a0": "its base base was unloaded",
        "a1": "its base base was unloaded",
    }
    assert not stage.stats().models
    stage.close()


def test_unloading_an_adapter_ends_its_own_requests_only() -> None:
    stage = stage_of(2)
    own, other, base = (stage.add(name, PROMPT, 60) for name in ("a0", "a1", "base"))
    stage.turn(20)
    stage.unload("a0")
    stage.until_quiet()
    assert own.finish is FinishReason.ABORTED
    assert (other.finish, base.finish) == (FinishReason.LENGTH, FinishReason.LENGTH)
    refused = stage.add("a0", PROMPT)
    stage.until_quiet()
    assert refused.last is not None
    assert refused.last.error_code == "NOT_FOUND"
    stage.check_all()
    stage.close()


def test_adapter_whose_copy_fails_is_unloaded_and_its_requests_end() -> None:
    stage = stage_of(1)
    stage.backend.adapters["lost"] = FakeAdapterSpec("base", "lost", swap_fails=True)
    stage.load_adapter("lost")
    stage.until_quiet()
    fine = stage.add("a0", PROMPT)
    stage.until_quiet()
    assert fine.finish is FinishReason.LENGTH
    assert "its weights did not come in: LoadFailed: the packed file is gone" in stage.failures()[-1].message
    assert {figures.model_id for figures in stage.stats().models} == {"base", "a0"}
    stage.close()


def test_figures_of_an_adapter() -> None:
    stage = stage_of(2)
    stage.add("a0", PROMPT, 6)
    stage.add("a0", PROMPT, 6)
    stage.until_quiet()
    figures = {each.model_id: each for each in stage.stats().models}
    assert figures["a0"].prompt_tokens_total == 18
    assert figures["a0"].generated_tokens_total == 12
    assert figures["a0"].weight_bytes == 5000
    assert figures["a1"].generated_tokens_total == 0
    assert figures["base"].generated_tokens_total == 12, "a base counts its adapters, too"
    stage.close()


@pytest.mark.parametrize("seed", [*range(12), *seeds_of_long_runs(12, 24)])
def test_random_lives_with_adapters(seed: int) -> None:
    stage = run_life(seed, 150, adapters=True, varied=True, faults=seed % 2 == 0)
    stage.check_all()
    stage.close()
