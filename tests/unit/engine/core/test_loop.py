"""The loop on the fake backend, scene by scene: loads, residency, faults, limits, ends."""

from typing import Any

import pytest

from common.model_state import Tier
from runtime.engine.interfaces import KvGeometry
from runtime.ipc.messages import EngineStats, Loaded, LoadFailed, Tokens, Unloaded
from runtime.types import FinishReason, LogprobParams, SamplingParams
from tests.support.engine_stage import Answer, Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec


def stage(
    names: str = "ab",
    *,
    total_slabs: int = 32,
    turn_s: float = 0.005,
    config: dict[str, Any] | None = None,
    **spec: object,
) -> Stage:
    roomy = KvGeometry(4, 32, 32, 1, 32, 64)  # 128 tokens a slab
    specs = {name: FakeSpec(**{"eos": (), "kv": roomy, **spec}) for name in names}  # type: ignore[arg-type]
    made = Stage(FakeBackend(specs, total_slabs=total_slabs), turn_s=turn_s, **(config or {}))
    for name in names:
        made.load(name)
    made.turn(10)
    assert sorted(made.loaded() + [f.model_id for f in made.failures()]) == sorted(names)
    return made


def tier(made: Stage, name: str) -> Tier:
    return next(m.tier for m in made.stats().models if m.model_id == name)


def error_of(answer: Answer) -> tuple[str | None, str]:
    assert answer.last is not None
    assert answer.finish is FinishReason.ERROR
    return answer.last.error_code, answer.last.error or ""


def test_loop_emits_one_message_per_step() -> None:
    made = stage("a")
    for i in range(5):
        made.add("a", [10 + i], 6)
    made.until_quiet()
    made.check_all()
    sizes = [len(event.rows) for event in made.of(Tokens)]  # type: ignore[union-attr]
    assert sizes == [5] * 6
    assert made.backend.steps == 6
    made.close()


def test_loop_alternates_two_resident_models() -> None:
    made = stage("ab")
    made.add("a", [10], 30)
    made.add("b", [10], 30)
    made.until_quiet()
    order = [event.model_id for event in made.of(Tokens)]  # type: ignore[union-attr]
    assert order[:20] in (["a", "b"] * 10, ["b", "a"] * 10)
    made.close()


def test_loop_chunks_prompt_to_quantum_only_beside_other_models() -> None:
    made = stage(
        "ab",
        max_model_len=1000,
        config={"quantum_us": 250, "max_batch_tokens": 512, "max_rows": 16},
        kv=KvGeometry(16, 8, 8, 1, 64, 64),
    )
    made.backend.max_batch_tokens = 512
    for _ in range(20):  # learn what a step costs: 100 + 2 µs a token
        made.add("a", [10], 3)
        made.add("b", [10], 3)
        made.until_quiet()
    made.backend.largest_step = 0
    made.add("a", list(range(20, 40)) * 20, 3)
    made.until_quiet()
    assert made.backend.largest_step == 400
    made.backend.largest_step = 0
    made.add("b", [11], 60)
    made.add("a", list(range(40, 60)) * 20, 3)
    made.until_quiet()
    assert 64 <= made.backend.largest_step <= 90  # (250 - 100) / 2 = 75
    made.check_all()
    made.close()


def test_residency_evicts_idle_model_and_brings_it_back() -> None:
    made = stage("abc", total_slabs=14, weight_slabs=5)
    assert [tier(made, name) for name in "abc"] == [Tier.DEVICE, Tier.DEVICE, Tier.DISK]
    made.add("b", [3], 4)
    made.until_quiet()
    made.add("c", [3], 4)
    made.until_quiet()
    assert [tier(made, name) for name in "abc"] == [Tier.DISK, Tier.DEVICE, Tier.DEVICE]
    made.add("a", [3], 4)
    made.until_quiet()
    assert [tier(made, name) for name in "abc"] == [Tier.DEVICE, Tier.DISK, Tier.DEVICE]
    assert [m.evictions_total for m in made.stats().models] == [1, 1, 0]
    made.check_all()
    made.close()


def test_loop_scores_prompt_that_fills_all_kv() -> None:
    made = stage("ab", total_slabs=12, weight_slabs=8, max_model_len=4096)
    most = next(event.facts.max_model_len for event in made.events if isinstance(event, Loaded))
    assert most == 4 * 128
    answer = made.add("b", [3] * most, 4, logprobs=LogprobParams(prompt=0))
    made.until_quiet()
    assert answer.finish is FinishReason.CONTEXT
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == most
    made.close()


def test_kv_usage_counts_memory_that_idle_models_can_give_up() -> None:
    # 4 slabs are free, and 4 hold the weights of "b"
    made = stage("ab", total_slabs=12, weight_slabs=4, max_model_len=1024)
    made.add("a", [3] * 250, 100)
    made.turn(3)
    used, idle = made.loop.table.stats().models
    assert (used.model_id, used.kv_used_tokens) == ("a", 192)
    assert used.kv_usage == 192 / (8 * 128)
    assert idle.kv_usage == 0.0
    made.add("b", [3] * 4, 100)
    made.turn(3)
    used, busy = made.loop.table.stats().models
    assert used.kv_usage >= 256 / (4 * 128)  # the weights of "b" have to stay now
    assert busy.model_id == "b"
    made.close()


def test_residency_serves_requests_of_absent_model_together() -> None:
    made = stage("ab", total_slabs=14, weight_slabs=8)
    answers = [made.add("b", [3 + i], 5) for i in range(6)]
    made.until_quiet()
    made.check_all()
    sizes = [len(e.rows) for e in made.of(Tokens) if e.model_id == "b"]  # type: ignore[union-attr]
    assert sizes == [6] * 5
    assert all(a.last is not None for a in answers)
    assert sum(m.swap_ins_total for m in made.stats().models) == 2
    made.close()


def test_loop_runs_second_model_beside_long_answer_while_memory_is_free() -> None:
    made = stage("ab", total_slabs=12, weight_slabs=4, max_model_len=512)  # 512 tokens of KV in 4 slabs
    long = made.add("a", [3] * 4, 500)
    made.turn(4)
    started_s = made.now
    for i in range(3):
        short = made.add("b", [5 + i] * 4, 4)
        while short.last is None:
            made.turn()
    assert made.now - started_s < 0.3
    assert long.last is None
    made.until_quiet()
    made.check_all()
    made.close()


def test_loop_bounds_wait_for_memory_that_another_model_holds() -> None:
    """All KV is in use by an earlier request. Neither it nor a request that waits for less than the limit is ended."""
    made = stage("ab", total_slabs=12, weight_slabs=4, max_model_len=4096, config={"wait_budget_s": 3.0})
    holder = made.add("a", [3] * 500, 11)
    while not holder.tokens:
        made.turn()
    made.turn_s = 0.5
    refused = made.add("b", [5] * 4, 4)
    made.turn(6)
    made.add("b", [6] * 4, 4)
    while refused.last is None:
        made.turn()
    code, text = error_of(refused)
    assert code == "RESOURCE_EXHAUSTED"
    assert "it waited 3 s, the limit, while running requests of a held the device memory" in text
    assert refused.last.retry_after_s is not None
    assert holder.last is None
    made.until_quiet()
    made.check_all()
    assert [answer.finish for answer in made.answers.values()].count(FinishReason.ERROR) == 1
    made.close()


def test_stats_estimate_when_running_sequences_end() -> None:
    made = stage("a", max_model_len=1000)
    assert made.stats().models[0].busy_s == 0.0
    for _ in range(8):  # learn what a step costs: 100 + 2 µs a token
        made.add("a", [10], 3)
        made.until_quiet()
    made.add("a", [10], 200)
    made.add("a", [10], 50)
    made.turn(3)
    assert made.stats().models[0].busy_s == pytest.approx(200 * 104e-6, rel=0.1)
    made.close()


def test_loop_does_not_preempt_only_row_for_later_request_of_other_model() -> None:
    made = stage("ab", total_slabs=12, weight_slabs=4, max_model_len=512)
    long = made.add("a", [3] * 4, 500)
    made.turn(4)
    late = [made.add("b", [5 + i] * 4, 300) for i in range(3)]
    made.until_quiet()
    made.check_all()
    assert long.finish is FinishReason.LENGTH
    assert all(answer.finish is FinishReason.LENGTH for answer in late)
    first, second = made.stats().models
    assert first.model_id == "a"
    assert first.preemptions_total == 0
    assert second.preemptions_total > 0
    made.close()


def test_residency_drains_busy_model_for_long_wait() -> None:
    made = stage("ab", total_slabs=14, weight_slabs=8, turn_s=0.02)
    waiting: list[Answer] = []
    served_at: dict[str, float] = {}
    start_s = made.now
    for turn in range(1500):  # "a" never runs dry by itself
        if turn % 3 == 0:
            made.add("a", [turn % 40 + 2], 8)
        if turn == 10:
            waiting.append(made.add("b", [5], 8))
        made.turn()
        if waiting and waiting[0].last is not None:
            served_at["b"] = made.now - start_s
            break
    assert served_at["b"] < 5.0
    made.until_quiet()
    made.check_all()
    made.close()


def test_residency_preempts_endless_row() -> None:
    made = stage(
        "ab", total_slabs=75, weight_slabs=40, turn_s=0.5, max_model_len=400, kv=KvGeometry(16, 8, 8, 1, 64, 64)
    )
    endless = made.add("a", [5], 390)
    made.turn(5)
    short = made.add("b", [5], 3)
    for _ in range(80):
        made.turn()
        if short.last is not None:
            break
    assert short.last is not None
    assert endless.last is None
    made.until_quiet()
    made.check_all()
    assert sum(m.preemptions_total for m in made.stats().models) == 1
    made.close()


def test_residency_lets_model_run_for_which_another_was_drained() -> None:
    """The long request came first and cannot continue beside the short one. It took the room back after each token of the short one."""
    made = stage("ab", total_slabs=18, weight_slabs=8, turn_s=0.5, max_model_len=160, kv=KvGeometry(4, 4, 4, 1, 64, 64))
    long = made.add("a", [5], 150)
    made.turn(40)
    assert tier(made, "b") is not Tier.DEVICE
    short = made.add("b", [5], 4)
    while short.last is None:
        made.turn()
    assert long.last is None
    assert {model.model_id: model.preemptions_total for model in made.stats().models} == {"a": 1, "b": 0}
    made.until_quiet()
    made.check_all()
    assert (len(short.tokens), len(long.tokens)) == (4, 150)
    made.close()


def test_residency_reclaims_prefixes_then_weights_then_rows() -> None:
    made = stage("ab", total_slabs=20, weight_slabs=4, max_model_len=150, kv=KvGeometry(4, 4, 4, 1, 64, 64))
    made.add("b", list(range(60)), 2)  # leaves four slabs of cached prefix
    made.until_quiet()
    cached = next(m for m in made.stats().models if m.model_id == "b").kv_cached_tokens
    assert cached >= 48
    made.add("a", list(range(100)), 10)  # 7 slabs: there is room without b's prefix
    made.until_quiet()
    assert tier(made, "b") is Tier.DEVICE
    answers = [made.add("a", [i] * 100, 40) for i in range(2)]  # 18 slabs
    made.until_quiet()
    assert tier(made, "b") is Tier.DISK
    made.check_all()
    assert all(a.finish is FinishReason.LENGTH for a in answers)
    assert sum(m.preemptions_total for m in made.stats().models) == 0
    made.close()


def test_loads_refuse_oversized_model_with_sizes() -> None:
    made = Stage(FakeBackend({"big": FakeSpec(weight_slabs=32), "huge": FakeSpec(weight_slabs=99)}, total_slabs=32))
    made.load("big")
    made.load("huge")
    made.turn(10)
    assert [f.code for f in made.failures()] == ["FAILED_PRECONDITION"] * 2
    for failure in made.failures():
        assert str(32 * 4096) in failure.message
    made.close()


def test_register_limits_context_to_budget() -> None:
    spec = FakeSpec(weight_slabs=20, max_model_len=10_000, eos=())
    made = Stage(FakeBackend({"a": spec}, total_slabs=40, max_batch_tokens=512))
    made.load("a")
    made.turn(10)
    assert made.loop.table.models["a"].facts.max_model_len == 20 * 16
    spec.max_model_len = 320
    made.add("a", [4] * 300, 1000)
    made.until_quiet()
    made.check_all()
    assert made.answers[1].finish is FinishReason.CONTEXT
    made.close()


def test_loads_answer_every_command_in_order() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(load_polls=4), "bad": FakeSpec(fails="no config.json")}))
    made.load("a")
    made.load("a")
    made.turn(10)
    made.load("a")
    made.turn(2)
    assert made.loaded() == ["a", "a", "a"]
    made.load("bad")
    made.turn(5)
    assert [(f.code, "no config.json" in f.message) for f in made.failures()] == [("FAILED_PRECONDITION", True)]
    made.load("a", max_model_len=50)  # another context: loaded anew
    made.turn(10)
    assert made.loop.table.models["a"].facts.max_model_len == 50
    made.unload("a")
    made.unload("a")
    made.turn(2)
    assert made.unloaded() == ["a", "a"]
    made.close()


def test_loads_unload_cancels_load_in_progress() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(load_polls=4)}))
    made.load("a")
    made.turn()
    made.unload("a")
    made.turn()
    assert [f.code for f in made.failures()] == ["CANCELLED"]
    assert made.unloaded() == []  # not before it is really gone
    made.load("a")
    made.turn(20)
    assert made.unloaded() == ["a"]
    assert made.loaded() == ["a"]
    assert sum(not memory.closed for memory in made.backend.memories) == 1
    made.close()


def test_loads_superseded_while_loading_are_answered_in_order() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(load_polls=4)}))
    made.load("a")
    made.turn()
    for max_model_len in (50, 60):
        made.load("a", max_model_len=max_model_len)
    made.unload("a")
    made.load("a", max_model_len=70)
    made.load("a", max_model_len=70)
    made.until_quiet()
    answers = [event for event in made.events if isinstance(event, Loaded | LoadFailed | Unloaded)]
    assert [type(answer) for answer in answers] == [LoadFailed, LoadFailed, LoadFailed, Unloaded, Loaded, Loaded]
    assert {failure.code for failure in made.failures()} == {"CANCELLED"}
    assert made.loop.table.models["a"].facts.max_model_len == 70
    assert sum(not memory.closed for memory in made.backend.memories) == 1
    made.close()


def test_loads_unload_aborts_rows_and_frees_memory() -> None:
    made = stage("a")
    answers = [made.add("a", [4], 100) for _ in range(20)]
    made.turn(6)
    made.unload("a")
    made.turn(2)
    assert {a.finish for a in answers} == {FinishReason.ABORTED}
    assert made.loop.table.slabs.free == 32
    late = made.add("a", [4], 4)
    made.turn(2)
    assert error_of(late)[0] == "NOT_FOUND"
    made.close()


def test_commands_abort_frees_row_at_once() -> None:
    made = stage("a", latency_polls=50)
    answer = made.add("a", [4], 100)
    made.turn(5)
    assert made.loop.table.rows.free == 15
    made.abort(1, 999)
    made.turn()
    assert answer.finish is FinishReason.ABORTED
    assert made.loop.table.rows.free == 16
    made.turn(5)
    made.close()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_loop_step_fault_fails_rows_and_second_unloads_model(where: str) -> None:
    made = stage("ab", latency_polls=50)
    lost = [made.add("a", [4], 100) for _ in range(3)]
    other = made.add("b", [4], 20)
    made.turn(6)
    made.backend.faults["a"] = where
    made.turn(6)
    assert [error_of(a)[0] for a in lost] == ["INTERNAL"] * 3
    assert "stumbled" in error_of(lost[0])[1] or "refuses" in error_of(lost[0])[1]
    good = made.add("a", [4], 4)
    made.until_quiet()
    assert good.finish is FinishReason.LENGTH
    for _ in range(2):
        made.backend.faults["a"] = where
        made.add("a", [4], 4)
        made.turn(8)
    assert [f.model_id for f in made.failures()] == ["a"]
    assert "a" not in made.loop.table.models
    made.until_quiet()
    assert other.finish is FinishReason.LENGTH
    made.check_all()
    made.close()


def test_loop_raises_when_device_is_lost() -> None:
    made = stage("a")
    made.add("a", [4], 10)
    made.turn(2)

    def lost() -> None:
        raise RuntimeError("the device fell off the bus")

    made.backend.synchronize = lost  # type: ignore[method-assign]
    made.backend.faults["a"] = "launch"
    with pytest.raises(RuntimeError, match="fell off"):
        made.turn(5)


def test_loop_failed_swap_in_unloads_one_model() -> None:
    made = stage("ab", total_slabs=14, weight_slabs=8)
    made.backend.broken_swap_ins["b"] = True
    lost = made.add("b", [4], 4)
    good = made.add("a", [4], 4)
    made.until_quiet()
    assert error_of(lost)[0] == "INTERNAL"
    assert good.finish is FinishReason.LENGTH or "a" in made.loop.table.models
    assert [f.model_id for f in made.failures()] == ["b"]
    made.close()


def test_refusals_name_the_limit_and_the_value() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(max_model_len=20)}))
    made.load("a", max_waiting=3)
    made.turn(10)
    too_long = made.add("a", [4] * 21, 4)
    empty = made.add("a", [], 4)
    made.turn()
    for answer, value in ((too_long, "21"), (empty, "0")):
        code, text = error_of(answer)
        assert code == "INVALID_ARGUMENT"
        assert "20" in text
        assert value in text
    answers = [made.add("a", [4], 4) for _ in range(5)]
    made.turn()
    refused = [error_of(a) for a in answers if a.finish is FinishReason.ERROR]
    assert [code for code, _ in refused] == ["RESOURCE_EXHAUSTED"] * 2
    assert "limit is 3" in refused[0][1]
    hints = [answer.last.retry_after_s for answer in answers if answer.last is not None]
    assert all(hint is None or hint > 0 for hint in hints)
    made.until_quiet()
    made.close()


def test_loop_emits_logprobs_and_cached_tokens_once() -> None:
    made = stage("a", eos=(0, 1))
    made.add("a", list(range(20)), 5, logprobs=LogprobParams(generated=0, prompt=0))
    made.add("a", list(range(20)), 0)
    made.until_quiet()
    again = made.add("a", list(range(20)), 5, logprobs=LogprobParams(generated=0))
    made.until_quiet()
    made.check_all()
    assert again.cached_tokens == 16
    assert made.answers[2].finish is FinishReason.LENGTH
    made.close()


def test_loop_passes_sampling_to_runner() -> None:
    made = stage("a")
    sampling = SamplingParams(temperature=0.7, seed=5, top_p=0.9)
    made.add("a", [7, 8], 3, sampling=sampling, min_tokens=2, stop_token_ids=(3,))
    made.turn(2)
    (row,) = made.backend.runners[0].rows.values()
    assert row.setup.sampling == sampling
    assert row.setup.suppressed == (3,)
    assert list(row.setup.prompt) == [7, 8]
    assert made.marks[-1] == "a"
    made.until_quiet()
    made.close()


@pytest.mark.parametrize(("grace_s", "finish"), [(100.0, FinishReason.LENGTH), (0.02, FinishReason.ERROR)])
def test_loop_shutdown_waits_for_grace_period(grace_s: float, finish: FinishReason) -> None:
    made = stage("a")
    answer = made.add("a", [4], 50)
    made.turn(5)
    made.shutdown(grace_s)
    made.turn()
    late = made.add("a", [4], 4)
    for _ in range(200):
        if made.loop.done:
            break
        made.turn()
    assert made.loop.done
    made.loop.run()
    assert answer.finish is finish
    assert error_of(late)[0] == "UNAVAILABLE"
    assert made.backend.mapped == 0


def test_loop_emits_stats_every_second_and_on_changes() -> None:
    made = stage("ab", turn_s=0.01)
    made.turn(5)
    before = len(made.of(EngineStats))
    made.turn(100)
    assert len(made.of(EngineStats)) - before == 1
    made.unload("b")
    made.turn()
    stats = made.of(EngineStats)[-1]
    assert isinstance(stats, EngineStats)
    assert [m.model_id for m in stats.models] == ["a"]
    assert stats.device_used_bytes == 4 * 4096
    made.close()
