"""Requests with a grammar in the engine loop: when they are planned, what they draw, and how they fail."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from runtime.engine.core.executor import OperationExecutor
from runtime.engine.interfaces import KvGeometry
from runtime.engine.operations import OpenRow, Operation, RunDraws, RunForward, RunStep
from runtime.ipc.messages import Shutdown
from runtime.types import FinishReason, LogprobParams, ReasoningBudget, SamplingParams
from tests.support.engine_stage import Stage, stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec
from tests.support.random_life import run_life, seeds_of_long_runs


def test_masked_rows_are_in_every_step_like_others() -> None:
    operations: list[Operation] = []
    made = Stage(FakeBackend({"a": FakeSpec(latency_polls=50)}), record=operations.append)
    made.load("a")
    made.until_quiet()
    plain = made.add("a", [5, 6], 30, ignore_eos=True)
    masked = made.add("a", [7, 8], 10, ignore_eos=True, grammar="half")
    made.until_quiet()
    made.check_all()
    assert (len(plain.tokens), len(masked.tokens)) == (30, 10)
    plans = [o.plan for o in operations if isinstance(o, RunStep | RunForward)]
    assert [len(plan.masked) for plan in plans] == [1] * 10 + [0] * 20
    assert [len(plan.rows) for plan in plans[:10]] == [2] * 10
    figures = made.stats().grammars
    assert (figures.masks_total, figures.grammars_total) == (10, 3)
    assert figures.mask_seconds_total > 0
    made.close()


@pytest.mark.parametrize("rows", [1, 3])
def test_row_whose_reasoning_has_ended_waits_for_no_mask(rows: int) -> None:
    operations: list[Operation] = []
    made = Stage(FakeBackend({"a": FakeSpec()}), record=operations.append, mask_sources=False)
    made.load("a")
    made.until_quiet()
    budget = ReasoningBudget(3, 40, starts_in_reasoning=True)
    limited = made.add("a", [5, 6], 30, ignore_eos=True, reasoning_budget=budget)
    for number in range(1, rows):
        made.add("a", [7, number], 30, ignore_eos=True)
    made.until_quiet()
    assert (limited.tokens[3], len(limited.tokens)) == (40, 30)
    # The step behind the closing token is launched before that token is known.
    assert [type(o) for o in operations if isinstance(o, RunStep | RunForward)] == [RunForward] * 5 + [RunStep] * 25
    made.close()


@pytest.mark.parametrize("more", [{"min_tokens": 9}, {"sampling": SamplingParams(temperature=0.0, allowed_token_ids=(40, 41, 42))}])  # fmt: skip
def test_row_whose_reasoning_has_ended_keeps_its_other_limits(more: dict[str, Any]) -> None:
    operations: list[Operation] = []
    made = Stage(FakeBackend({"a": FakeSpec()}), record=operations.append, mask_sources=False)
    made.load("a")
    made.until_quiet()
    budget = ReasoningBudget(3, 40, starts_in_reasoning=True)
    made.add("a", [5, 6], 20, ignore_eos=True, reasoning_budget=budget, **more)
    made.until_quiet()
    masked = sum(isinstance(operation, RunForward) for operation in operations)
    assert masked == (10 if "min_tokens" in more else 20)
    made.close()


def test_masks_hold_under_preemption_with_the_other_parameters() -> None:
    opened: Counter[tuple[int, ...]] = Counter()

    def record(operation: Operation) -> None:
        if isinstance(operation, OpenRow) and operation.setup.masked:
            opened[tuple(operation.setup.prompt)] += 1

    made = run_life(4, 300, faults=False, varied=True, record=record)
    made.check_all()
    asked = Counter(a.add.request.prompt for a in made.answers.values() if a.add.request.grammar is not None)
    assert any(count > asked[prompt] for prompt, count in opened.items()), "no masked row was preempted"
    assert sum(model.prefix_hit_tokens_total for model in made.stats().models) > 0
    made.close()


def test_bad_words_are_not_drawn_beside_other_rows_and_after_a_preemption() -> None:
    made = stage("a", total_slabs=8, max_model_len=600, config={"mask_sources": False})
    free = made.add("a", [5, 6], 60, ignore_eos=True)
    made.until_quiet()
    banned = ((free.tokens[3],), tuple(free.tokens[8:10]), (free.tokens[20], 7))
    answers = [made.add("a", [5, 6], 250, ignore_eos=True, bad_words=banned) for _ in range(3)]
    made.add("a", [5, 6], 250, ignore_eos=True)
    made.until_quiet()
    made.check_all()
    assert answers[0].tokens[:3] == free.tokens[:3]
    assert free.tokens[3] not in answers[0].tokens
    assert sum(model.preemptions_total for model in made.stats().models) > 0
    made.close()


def test_masks_hold_when_the_model_is_evicted_and_returns() -> None:
    made = stage("ab", weight_slabs=16, total_slabs=24)
    for _ in range(3):
        for model_id in ("a", "b"):
            made.add(model_id, [5, 6, 7, 8, 9], 12, grammar="half")
            made.add(model_id, [5, 6, 7, 8, 9], 12)
            made.until_quiet()
    made.check_all()
    assert sum(model.evictions_total for model in made.stats().models) >= 4
    made.close()


def test_masked_row_ends_with_its_grammar_below_min_tokens_and_without_eos() -> None:
    made = stage("a", vocab=40, eos=(0,))
    answer = made.add("a", [5], 30, grammar="half/2", min_tokens=2)
    early = made.add("a", [5], 30, grammar="half/1", min_tokens=6)
    ignoring = made.add("a", [5], 30, grammar="half/3", ignore_eos=True)
    made.until_quiet()
    made.check_all()
    assert answer.finish is FinishReason.EOS
    assert (early.tokens[1:], early.finish) == ([0], FinishReason.EOS)
    assert (ignoring.tokens[3:], ignoring.finish) == ([0], FinishReason.EOS)
    made.close()


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        ("raises/3", "its grammar failed after 3 output tokens: ValueError: the parser is stuck"),
        ("exceeds/3", "its grammar failed after 3 output tokens: too complex"),
        ("empty/3", "its grammar allows no token after 3 output tokens"),
    ],
)
def test_masked_row_with_a_broken_grammar_ends_alone(grammar: str, text: str) -> None:
    made = stage("a")
    broken = made.add("a", [5], 12, ignore_eos=True, grammar=grammar)
    others = [made.add("a", [6], 12, ignore_eos=True), made.add("a", [7], 12, ignore_eos=True, grammar="half")]
    made.until_quiet()
    for other in others:
        made.check_text(other)
    assert len(broken.tokens) == 3
    assert broken.last is not None
    code = "INVALID_ARGUMENT" if grammar.startswith("exceeds") else "INTERNAL"
    assert (broken.finish, broken.last.error_code, broken.last.error) == (FinishReason.ERROR, code, text)
    assert not made.failures()
    made.close()


def test_masked_row_is_refused_with_the_grammars_error() -> None:
    made = stage("a")
    answer = made.add("a", [5], 12, grammar="refused")
    made.until_quiet()
    assert answer.last is not None
    assert (answer.last.error_code, answer.last.error) == ("INVALID_ARGUMENT", "the grammar has no rule named root")
    made.close()


def test_masked_row_is_refused_without_mask_sources() -> None:
    made = Stage(FakeBackend({"a": FakeSpec()}), mask_sources=False)
    made.load("a")
    made.until_quiet()
    answer = made.add("a", [5], 12, grammar="half")
    made.until_quiet()
    assert answer.last is not None
    assert answer.last.error_code == "UNIMPLEMENTED"
    made.close()


@pytest.mark.parametrize("seed", [*range(6), *seeds_of_long_runs(6, 12)])
def test_random_lives_with_grammars(seed: int) -> None:
    made = run_life(seed, 250, varied=True)
    made.check_all()
    made.close()


def test_recorded_masks_replay_without_a_mask_source() -> None:
    log: list[bytes] = []
    made = run_life(
        5, 250, faults=False, varied=True, record=lambda operation: log.append(msgspec.msgpack.encode(operation))
    )
    made.close()
    first = made.backend
    second = FakeBackend(
        first.specs, total_slabs=first.total_slabs, max_rows=first.max_rows, max_batch_tokens=first.max_batch_tokens
    )
    decoder: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
    executor = OperationExecutor(second)
    operations = [decoder.decode(data) for data in log]
    for operation in operations:
        launched = executor.apply(operation)
        if launched is not None:
            launched.collect()
    assert sum(isinstance(operation, RunDraws) for operation in operations) > 20
    assert second.results == first.results
    assert second.snapshot() == first.snapshot()


def test_forced_tokens_are_taken_without_a_step_each() -> None:
    operations: list[Operation] = []
    made = Stage(FakeBackend({"a": FakeSpec()}), record=operations.append)
    made.load("a")
    made.until_quiet()
    answers = [made.add("a", [seed], 40, grammar="often", ignore_eos=True) for seed in range(5, 9)]
    scored = made.add("a", [3], 40, grammar="often", ignore_eos=True, logprobs=LogprobParams(0))
    made.until_quiet()
    made.check_all()
    assert [len(answer.tokens) for answer in (*answers, scored)] == [40] * 5
    rows = Counter(row for o in operations if isinstance(o, RunForward) for row in o.plan.masked)
    steps = sorted(rows.values())
    assert steps[-1] == 40, "log-probabilities need a draw for each token"
    assert sum(steps[:-1]) < 2 * 40, "most of the tokens are forced"
    made.close()


@pytest.mark.parametrize(("rows", "chunks"), [(4, True), (20, False)])
def test_forced_tokens_leave_a_large_batch_as_it_is(rows: int, chunks: bool) -> None:
    operations: list[Operation] = []
    spec = FakeSpec(latency_polls=0, kv=KvGeometry(4, 4, 8, 2, 256, 400))
    backend = FakeBackend({"a": spec}, total_slabs=600, max_rows=32)
    made = Stage(backend, record=operations.append)
    made.load("a")
    made.until_quiet()
    for seed in range(5, 5 + rows):
        made.add("a", [seed, 6], 100, grammar="often", ignore_eos=True)
    made.until_quiet()
    made.check_all()
    # Rows that came first may have left the batch while it was small.
    plans = [o.plan for o in operations if isinstance(o, RunForward)]
    whole = [plan for plan in plans if len(plan.rows) == rows][4:]
    assert len(whole) > 4
    assert any(max(plan.counts) > 1 for plan in whole) is chunks
    made.close()


def test_masked_row_whose_grammar_is_being_made_can_be_aborted() -> None:
    made = Stage(FakeBackend({"a": FakeSpec()}), grammar_polls=40)
    made.load("a")
    made.turn(20)
    slow, gone = made.add("a", [5], 6, grammar="half"), made.add("a", [5], 6, grammar="half")
    plain = made.add("a", [6], 6)
    made.turn(20)
    assert (plain.last is not None, slow.tokens) == (True, [])
    made.abort(gone.add.request_id)
    made.until_quiet()
    made.check_all()
    assert gone.finish is FinishReason.ABORTED
    assert slow.finish in (FinishReason.LENGTH, FinishReason.EOS)
    made.close()


def test_unload_ends_requests_whose_grammar_is_being_made() -> None:
    made = Stage(FakeBackend({"a": FakeSpec()}), grammar_polls=40)
    made.load("a")
    made.turn(20)
    answer = made.add("a", [5], 6, grammar="half")
    made.turn()
    made.unload("a")
    made.until_quiet()
    assert answer.finish is FinishReason.ABORTED
    assert made.mask_sources.retained == frozenset()
    made.close()


def test_waiting_grammars_count_as_waiting_requests() -> None:
    made = Stage(FakeBackend({"a": FakeSpec()}), grammar_polls=40)
    made.load("a", max_waiting=2)
    made.turn(20)
    answers = [made.add("a", [5], 6, grammar="half") for _ in range(3)]
    made.turn(2)
    refused = answers[2].last
    assert refused is not None
    assert refused.error_code == "RESOURCE_EXHAUSTED"
    made.until_quiet()
    made.close()


def test_idle_work_waits_while_a_grammar_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stage(FakeBackend({"a": FakeSpec()}), grammar_polls=30)
    made.load("a")
    made.until_quiet()
    answer = made.add("a", [5], 4, grammar="half")
    was_answered: list[bool] = []

    def idle(mark: Callable[[str], None]) -> bool:
        was_answered.append(answer.last is not None)
        made.inbox.put(Shutdown(0.0))
        return False

    monkeypatch.setattr(made.backend, "idle", idle)
    made.loop.run()
    assert was_answered
    assert all(was_answered)
