"""One model's scheduler against plain books: what a plan may hold, results that come a step late, stops, priorities, preemption."""

from collections.abc import Callable

import pytest

from runtime.engine.interfaces import KvGeometry, StepOutput
from runtime.engine.kvcache.blocks import BlockPool
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.scheduler.limits import KvRoom, Limits
from runtime.engine.scheduler.outputs import Step
from runtime.engine.scheduler.row_pool import ModelRows, RowPool
from runtime.engine.scheduler.scheduler import SCORED_TOKENS, Scheduler
from runtime.engine.scheduler.sequence import Sequence, State, from_add
from runtime.ipc.messages import Add, RowTokens
from runtime.types import FinishReason, GenerationRequest, LogprobParams, SamplingParams, StopParams


class NoMapper:
    def map_kv(self, index: int, slab: int) -> None: ...

    def unmap_kv(self, index: int) -> None: ...


class Bench:
    """A scheduler with blocks of 4 tokens in slabs of 4."""

    def __init__(
        self, *, slabs: int = 100, rows: int = 16, eos: tuple[int, ...] = (0, 1), max_model_len: int = 1000
    ) -> None:
        self.pool = SlabPool(slabs)
        self.cache = PrefixCache(BlockPool(KvGeometry(4, 4, 4, 1, 1, 1000), self.pool, "m/kv", NoMapper()))
        self.rows = RowPool(rows)
        self.scheduler = Scheduler(eos, self.cache, ModelRows(self.rows, lambda row: None))
        self.max_model_len = max_model_len
        self.now = 0.0
        self._ids = 0

    def add(self, prompt: list[int], max_tokens: int = 10, *, priority: int = 0, **more: object) -> Sequence:
        self._ids += 1
        sampling = more.pop("sampling", SamplingParams(temperature=0.0))
        logprobs = more.pop("logprobs", LogprobParams())
        request = GenerationRequest(
            prompt=tuple(prompt),
            sampling=sampling,  # type: ignore[arg-type]
            stop=StopParams(max_tokens, **more),  # type: ignore[arg-type]
            logprobs=logprobs,  # type: ignore[arg-type]
            priority=priority,
        )
        sequence = from_add(Add(self._ids, "m", request), self._ids, self.now, self.max_model_len)
        self.scheduler.add(sequence)
        return sequence

    def plan(self, budget: int = 64, *, admit: int = 99, kv_blocks: int | None = None) -> Step | None:
        blocks = self.pool.free * 4 + self.cache.blocks.slabs * 4 if kv_blocks is None else kv_blocks
        return self.scheduler.plan(Limits(budget, KvRoom(blocks, blocks), admit), self.now)

    def must_plan(self, budget: int = 64) -> Step:
        step = self.plan(budget)
        assert step is not None
        return step

    def settle(self, step: Step, token: Callable[[int], int] | int = 7) -> dict[int, RowTokens]:
        drawing = [row for row, draws in zip(step.plan.rows, step.plan.samples, strict=True) if draws]
        tokens = [token if isinstance(token, int) else token(row) for row in drawing]
        rows = self.scheduler.settle(step, StepOutput(tokens, 10.0), self.now)
        self.scheduler.check()
        return {row.request_id: row for row in rows}


def test_decode_rows_come_first_and_chunks_fill_the_budget() -> None:
    bench = Bench()
    bench.add([5] * 3)
    first = bench.must_plan()
    assert (first.plan.starts, first.plan.counts, first.plan.samples, first.plan.from_device) == (
        [0],
        [3],
        [1],
        [False],
    )
    bench.add([6] * 20)
    second = bench.must_plan(budget=8)
    assert second.plan.from_device == [True, False]
    assert second.plan.counts == [1, 7]
    assert second.plan.samples == [1, 0]
    third = bench.must_plan(budget=8)
    assert third.plan.starts == [4, 7]
    assert third.plan.tokens == [6] * 7
    last = bench.must_plan(budget=8)
    assert (last.plan.starts, last.plan.counts, last.plan.samples) == ([5, 14], [1, 6], [1, 1])
    assert bench.must_plan().plan.from_device == [True, True]


def test_scheduler_drops_an_ended_row_from_the_step_that_was_planned() -> None:
    bench = Bench()
    ends = bench.add([5, 6])
    goes_on = bench.add([8, 9])
    first = bench.must_plan()
    second = bench.must_plan()
    rows = bench.settle(first, lambda row: 0 if row == first.plan.rows[0] else 7)
    assert rows[ends.request_id].finish is FinishReason.EOS
    assert rows[ends.request_id].stop_token == 0
    assert ends.state is State.ENDED
    rows = bench.settle(second)
    assert list(rows) == [goes_on.request_id]
    assert ends.tokens[2:3] == [0]


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "finish", "drawn"),
    [
        (3, 100, FinishReason.LENGTH, 3),
        (1, 100, FinishReason.LENGTH, 1),
        (50, 6, FinishReason.CONTEXT, 4),
        (4, 6, FinishReason.LENGTH, 4),
    ],
)
def test_ends_by_count_are_never_overrun(max_tokens: int, max_model_len: int, finish: FinishReason, drawn: int) -> None:
    bench = Bench(max_model_len=max_model_len)
    sequence = bench.add([5, 6], max_tokens)
    steps = []
    while (step := bench.plan()) is not None:
        steps.append(step)
        assert len(steps) <= drawn
    ends = [bench.settle(step)[sequence.request_id].finish for step in steps]
    assert ends == [None] * (drawn - 1) + [finish]
    assert bench.scheduler.running == 0
    assert bench.rows.free == bench.rows.total


def test_stop_ids_min_tokens_and_ignore_eos() -> None:
    bench = Bench(eos=(0, 1))
    own = bench.add([5], stop_token_ids=(9,))
    careless = bench.add([6], ignore_eos=True)
    patient = bench.add([7], min_tokens=2, stop_token_ids=(9,))
    first = bench.must_plan()
    suppressed = {setup.row: setup.suppressed for setup in first.opened}
    assert [suppressed[row] for row in first.plan.rows] == [(), (), (0, 1, 9)]
    assert first.opened[2].min_tokens == 2
    rows = bench.settle(first, 9)
    assert rows[own.request_id].finish is FinishReason.STOP_TOKEN
    assert rows[careless.request_id].finish is None
    assert rows[patient.request_id].finish is None
    assert bench.settle(bench.must_plan(), 1)[careless.request_id].finish is None
    assert bench.settle(bench.must_plan(), 1)[patient.request_id].finish is FinishReason.EOS


def test_prefix_hits_are_shared_and_never_cover_the_last_token() -> None:
    bench = Bench()
    prompt = list(range(10, 18))  # exactly two blocks
    first = bench.add(prompt)
    bench.settle(bench.must_plan())
    second = bench.add(prompt)
    third = bench.add([*prompt, 50])
    step = bench.must_plan()
    assert step.plan.starts[1:] == [4, 8]
    assert step.plan.counts[1:] == [4, 1]
    assert second.block_ids[:1] == first.block_ids[:1]
    assert third.block_ids[:2] == first.block_ids[:2]
    rows = bench.settle(step)
    assert rows[second.request_id].cached_tokens == 4
    assert rows[third.request_id].cached_tokens == 8
    tables = {(row, index): page for row, index, page in step.plan.new_blocks}
    assert tables[third.row, 0] == first.block_ids[0]


def test_equal_prompts_that_come_at_once_are_computed_once() -> None:
    bench = Bench()
    prompt = list(range(10, 30))
    for _ in range(3):
        bench.add(prompt)
    step = bench.must_plan()
    assert step.plan.counts == [20, 4, 4]
    assert step.plan.starts == [0, 16, 16]


def test_scheduler_finds_a_block_filled_by_a_lone_token_in_the_next_plan() -> None:
    """Where every row of a step has one token, a row reads all but its own before that step's are written."""
    bench = Bench()
    prompt = list(range(10, 18))
    bench.add(prompt)
    bench.settle(bench.must_plan(7))
    second = bench.add([*prompt, 50])
    step = bench.must_plan()
    assert step.plan.counts == [1, 5]
    assert second.num_shared_blocks == 1
    bench.settle(step)
    third = bench.add([*prompt, 60])
    bench.settle(bench.must_plan())
    assert third.num_shared_blocks == 2


def test_prompt_logprobs_skip_the_cache_and_penalties_skip_what_was_generated() -> None:
    bench = Bench()
    prompt = list(range(10, 22))
    bench.add(prompt)
    bench.settle(bench.must_plan())
    asks = bench.add(prompt, logprobs=LogprobParams(prompt=0))
    step = bench.must_plan()
    assert step.plan.starts[-1] == 0
    assert step.plan.prompt_logprobs == [asks.row]
    penalty = bench.add(prompt[:5], 40, sampling=SamplingParams(temperature=0.0, frequency_penalty=0.5))
    plain = bench.add([30, *prompt[:4]], 40)
    for _ in range(12):
        bench.settle(bench.must_plan())
    assert bench.scheduler.preempt_newest(0.0)
    assert bench.scheduler.preempt_newest(0.0)
    assert (penalty.state, plain.state) == (State.WAITING, State.WAITING)
    bench.must_plan()
    assert penalty.num_cached_tokens == 4
    assert penalty.num_shared_blocks == 1  # of the prompt alone
    assert plain.num_shared_blocks >= 3


def test_higher_priority_is_admitted_first_and_the_least_entitled_makes_way() -> None:
    bench = Bench(rows=2)
    low = bench.add([5])
    high = bench.add([6], priority=1)
    also_low = bench.add([7])
    step = bench.must_plan()
    assert [chunk.sequence for chunk in step.prefill] == [high, low]
    assert bench.scheduler.preempt_newest(0.0)
    assert (high.state, low.state, also_low.state) == (State.RUNNING, State.WAITING, State.WAITING)
    assert bench.scheduler.waiting.head() is low


def test_preemption_keeps_what_was_drawn_and_takes_the_token_on_its_way() -> None:
    bench = Bench()
    sequence = bench.add([5, 6, 8], 10)
    bench.settle(bench.must_plan(), 20)
    flying = bench.must_plan()
    assert bench.scheduler.preempt_newest(0.0)
    assert bench.plan() is None  # not before its last step has landed
    assert bench.settle(flying, 21)[sequence.request_id].tokens == (21,)
    again = bench.must_plan()
    assert again.plan.tokens[-2:] == [20, 21]
    assert again.opened[0].prompt_len == 3
    assert list(again.opened[0].prompt) == [5, 6, 8]
    assert bench.settle(again, 22)[sequence.request_id].cached_tokens is None
    assert sequence.tokens == [5, 6, 8, 20, 21, 22]


def test_admission_counts_what_is_to_come() -> None:
    bench = Bench(slabs=5)  # 20 blocks, 80 tokens
    bench.add([5] * 8, 40)
    bench.add([6] * 8, 40)
    step = bench.must_plan()
    assert len(step.plan.rows) == 1  # two would need 24 blocks in the end
    assert bench.scheduler.totals.preemptions == 0


def test_admission_by_estimate_holds_a_sequence_back_for_a_second_at_most() -> None:
    bench = Bench(slabs=5)
    for token in (5, 6, 7):
        bench.add([token] * 8, 40)
    bench.settle(bench.must_plan())
    assert bench.scheduler.running == 1
    bench.now = 1.0
    bench.settle(bench.must_plan())
    assert bench.scheduler.running == 2
    bench.now = 1.9
    bench.settle(bench.must_plan())
    assert bench.scheduler.running == 2  # each admission by age is at least a second after the one before
    bench.now = 2.0
    bench.settle(bench.must_plan())
    assert bench.scheduler.running == 3


def test_admission_of_a_lone_sequence_ignores_what_other_models_may_need_later() -> None:
    bench = Bench(slabs=5)
    bench.add([5] * 8, 40)
    assert bench.scheduler.plan(Limits(64, KvRoom(planned=0, now=2), 9), 0.0) is None  # 9 tokens need 3 blocks
    step = bench.scheduler.plan(Limits(64, KvRoom(planned=0, now=3), 9), 0.0)
    assert step is not None
    assert bench.scheduler.promised_blocks == 0


def test_admission_by_age_needs_memory_now() -> None:
    bench = Bench(slabs=5)
    bench.add([5] * 70, 8)
    bench.settle(bench.must_plan(budget=100))
    bench.add([6] * 8, 40)
    bench.now = 5.0
    bench.settle(bench.must_plan())
    assert bench.scheduler.running == 1  # 18 of 20 blocks are used, and the second needs 3
    assert bench.scheduler.totals.preemptions == 0


def test_admission_runs_first_sequences_without_max_tokens_together() -> None:
    bench = Bench(slabs=400, max_model_len=1600)
    for i in range(6):
        bench.add([i + 2] * 8, 1592)
    assert len(bench.must_plan().plan.rows) == 6


def test_scheduler_preempts_the_newest_without_room_and_ends_all() -> None:
    bench = Bench(slabs=4)
    sequences = [bench.add([i + 2] * 6, 30) for i in range(3)]
    for i in range(40):
        # admission is given more room than there is
        step = bench.plan(kv_blocks=1000)
        if step is not None:
            bench.settle(step, 100 + i)
    while any(s.state is not State.ENDED for s in sequences):
        bench.settle(bench.must_plan())
    assert bench.scheduler.totals.preemptions > 0
    assert all(s.num_output_tokens == 30 for s in sequences)


def test_scheduler_ends_the_rows_of_a_broken_step_and_drops_its_blocks() -> None:
    bench = Bench()
    prompt = list(range(10, 18))
    first = bench.add([*prompt, 1])
    step = bench.must_plan()
    second = bench.add([*prompt, 2])
    later = bench.must_plan()
    assert second.block_ids[0] == first.block_ids[0]  # it reads what the first step was to write
    assert bench.scheduler.fail(step, 0.0) == [first]
    assert bench.settle(later) == {}
    again = bench.must_plan()
    assert again.plan.starts == [0]
    assert bench.settle(again, 7)[second.request_id].tokens == (7,)
    assert first.state is State.ENDED


def test_scheduler_draws_nothing_for_the_prompts_logprobs_alone() -> None:
    bench = Bench()
    sequence = bench.add([5] * 10, 0, logprobs=LogprobParams(prompt=0))
    steps = [bench.must_plan(budget=6), bench.must_plan(budget=6)]
    assert not any(any(step.plan.samples) for step in steps)
    assert bench.settle(steps[0]) == {}
    row = bench.settle(steps[1])[sequence.request_id]
    assert (row.tokens, row.finish) == ((), FinishReason.LENGTH)


def test_scheduler_bounds_the_prompt_tokens_that_a_step_scores() -> None:
    bench = Bench(slabs=2000, max_model_len=8000)
    scored = bench.add(list(range(2, 1502)), logprobs=LogprobParams(prompt=0))
    plain = bench.add(list(range(3, 1503)))
    step = bench.must_plan(8000)
    counts = dict(zip(step.plan.rows, step.plan.counts, strict=True))
    assert counts == {scored.row: SCORED_TOKENS, plain.row: 1500}
