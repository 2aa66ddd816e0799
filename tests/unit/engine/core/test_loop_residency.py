"""Which models hold device memory while several want it: evictions, waits, drains and preemption, on the fake backend."""

from common.model_state import Tier
from runtime.engine.interfaces import KvGeometry
from runtime.ipc.messages import Tokens
from runtime.types import FinishReason
from tests.support.engine_stage import Answer, Stage, error_of, stage


def tier(made: Stage, name: str) -> Tier:
    return next(m.tier for m in made.stats().models if m.model_id == name)


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
