"""The fake backend's model runner, which checks each plan and reads every token back through the page tables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtime.engine.grammar.interfaces import TokenMasks, mask_words
from runtime.engine.interfaces import (
    Bucket,
    GraphCapture,
    GraphChoice,
    RowSetup,
    StepOutput,
    StepPlan,
)
from runtime.ipc.messages import TokenLogprobs
from runtime.types import ModelFacts, Pooling
from tests.support.fake_adapters import FakeBank
from tests.support.fake_memory import FakeMemory
from tests.support.fake_specs import FakeSpec, draw, voice
from tests.support.masks import unpack

if TYPE_CHECKING:
    from tests.support.fake_backend import FakeBackend


@dataclass
class FakeRow:
    setup: RowSetup
    table: dict[int, int] = field(default_factory=dict)
    last: int | None = None
    adapter: str = ""  # in the step that runs
    may_be_masked: bool = False  # every draw so far had a mask


class FakeLaunched:
    def __init__(self, runner: "FakeRunner", result: StepOutput | None, polls: int) -> None:
        self._runner = runner
        runner.flying += 1
        self._result = result
        self._polls = polls

    def ready(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def collect(self) -> StepOutput:
        self._runner.flying -= 1
        if self._result is None:
            raise RuntimeError("the fake device stumbled")
        return self._result


class FakeRunner:
    def __init__(
        self, backend: "FakeBackend", facts: ModelFacts, spec: FakeSpec, memory: FakeMemory, bank: FakeBank
    ) -> None:
        self.facts = facts
        self._bank = bank
        self.adapters_expected = False
        self._backend = backend
        self._spec = spec
        self._memory = memory
        self.rows: dict[int, FakeRow] = {}
        self.closed = False
        self.flying = 0
        self.undrawn: StepPlan | None = None  # a forward pass was launched, its draws were not

    def open_row(self, setup: RowSetup) -> None:
        assert setup.row not in self._backend.open_rows, "the row is taken"
        assert 0 <= setup.row < self._backend.max_rows
        assert len(setup.prompt) == setup.prompt_len
        self.rows[setup.row] = FakeRow(setup, may_be_masked=setup.masked)
        self._backend.open_rows.add(setup.row)

    def expect_adapters(self) -> None:
        self.adapters_expected = True

    def close_row(self, row: int) -> None:
        # a row whose step broke at its launch may never have been opened
        if self.rows.pop(row, None) is not None:
            self._backend.open_rows.remove(row)

    def close(self) -> None:
        assert not self.rows
        assert not self.flying, "closed under a step in flight"
        assert not self._memory.closed
        self.closed = True

    def choose_graph(self, plan: StepPlan) -> GraphChoice:
        return GraphChoice()

    def has_graph(self, bucket: Bucket) -> bool:
        return False

    def is_prepared(self) -> bool:
        return not any(capture.model_id == self.facts.model_id for capture in self._backend.captures)

    def capture(self, bucket: Bucket, *, record: bool) -> None:
        self._backend.captured.append(GraphCapture(self.facts.model_id, bucket, record))

    def launch(self, plan: StepPlan, padded_to: Bucket | None = None) -> FakeLaunched:
        return self._checked(plan, None)

    def launch_forward(self, plan: StepPlan, padded_to: Bucket | None = None) -> None:
        assert plan.masked
        self.undrawn = plan

    def mask_lines(self, count: int) -> TokenMasks:
        return np.full((count, mask_words(self.facts.vocab_size)), -1, np.int32)

    def launch_draws(self, masks: TokenMasks) -> FakeLaunched:
        plan, self.undrawn = self.undrawn, None
        assert plan is not None
        return self._checked(plan, masks)

    def _checked(self, plan: StepPlan, masks: TokenMasks | None) -> FakeLaunched:
        try:
            assert self._backend.undrawn_plans() == 0, "a step between a forward pass and its draws"
            assert len(plan.masked) == (0 if masks is None else len(masks)), "a mask for each masked row"
            assert masks is None or masks.flags.writeable, "a runner may change the masks"
            return self._launch(plan, {} if masks is None else dict(zip(plan.masked, masks, strict=True)))
        except AssertionError as error:
            # the engine takes it for a fault of the device, and lives on
            self._backend.broken_rules.append(f"{self.facts.model_id}: {error}")
            raise

    def _launch(self, plan: StepPlan, masks: dict[int, TokenMasks]) -> FakeLaunched:
        assert self._memory.resident, "launched without weights"
        fault = self._backend.faults.pop(self.facts.model_id, "")
        if fault == "launch":
            raise RuntimeError("the fake device refuses")
        self._check(plan)
        for at_row, index, page in plan.new_blocks:
            assert page // self._memory.kv.pages_per_slab in self._memory.kv_slab, f"page {page} is not mapped"
            assert (page % self._memory.kv.pages_per_slab) % self._memory.kv.pages_per_block == 0
            self.rows[at_row].table[index] = page
        holders: dict[int, list[tuple[int, int]]] = {}  # page → rows that have it, and where
        for slot, opened in self.rows.items():
            for index, page in opened.table.items():
                holders.setdefault(page, []).append((slot, index))
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        vectors: dict[int, bytes] = {}
        at = 0
        work = []
        for i, slot in enumerate(plan.rows):
            row = self.rows[slot]
            adapter = plan.adapters[i] if plan.adapters else -1
            row.adapter = self._bank.content(adapter) if adapter >= 0 else ""
            if plan.from_device[i]:
                assert row.last is not None, "nothing was drawn yet"
                ids = [row.last]
            else:
                ids = plan.tokens[at : at + plan.counts[i]]
                at += plan.counts[i]
            self._write(row, plan.starts[i], ids)
            self._check_alone(plan, i, holders)
            work.append((i, slot, row, ids))
        assert at == len(plan.tokens)
        for i, slot, row, ids in work:
            end = plan.starts[i] + len(ids)
            if slot in plan.prompt_logprobs:
                history = self._read(row, end)
                positions = range(plan.starts[i], end)
                prompt_logprobs[slot] = [
                    self.logprob(history[: position + 1]) if position else None for position in positions
                ]
            for pooled_row, first, last, reduction in plan.pooled:
                if pooled_row == slot:
                    assert plan.starts[i] <= first <= last <= end, "pooled tokens that the step does not compute"
                    states = [self.hidden(self._read(row, position + 1)) for position in range(first, last)]
                    hidden = np.array(states, np.float32).reshape(-1, 2)
                    weights = np.arange(first, last)[:, None] + 1 if reduction == "weighted" else 1
                    reduced = hidden.max(0) if reduction == "max" else (weights * hidden).sum(0)
                    vectors[slot] = vectors.get(slot, b"") + reduced.astype(np.float32).tobytes()
            for known in range(end - plan.samples[i] + 1, end + 1):
                history = self._read(row, known)
                drawn = known - row.setup.prompt_len
                suppressed = row.setup.suppressed if drawn < row.setup.min_tokens else ()
                assert row.may_be_masked or slot not in masks, "masked without being set up for it, or again"
                row.may_be_masked = slot in masks
                allowed = unpack(masks[slot], self._spec.vocab) if slot in masks else None
                token = draw(voice(self.facts.model_id, row.adapter), history, self._spec.vocab, suppressed, allowed)
                row.last = token
                tokens.append(token)
                wanted = row.setup.logprobs.generated is not None
                logprobs.append(self.logprob([*history, token]) if wanted else None)
        self._backend.steps += 1
        self._backend.largest_step = max(self._backend.largest_step, plan.num_tokens)
        if fault == "collect":
            self._backend.results.append(None)
            return FakeLaunched(self, None, self._spec.latency_polls)
        result = StepOutput(
            tokens,
            100.0 + self._backend.token_us * plan.num_tokens + self._backend.adapter_us * len({*plan.adapters} - {-1}),
            logprobs if any(logprobs) else None,
            prompt_logprobs or None,
            vectors or None,
        )
        self._backend.results.append(result)
        return FakeLaunched(self, result, self._spec.latency_polls)

    @staticmethod
    def hidden(history: Sequence[int]) -> npt.NDArray[np.float32]:
        """The last token's hidden state. Sums of a test's prompts are exact."""
        return np.array([draw("hidden", history, 1000), len(history)], np.float32)

    @classmethod
    def vectors(cls, prompt: Sequence[int], pooling: Sequence[Pooling]) -> npt.NDArray[np.float32]:
        """The vectors of a whole prompt, end to end."""
        states = np.stack([cls.hidden(prompt[: end + 1]) for end in range(len(prompt))])
        weights = np.arange(1, len(states) + 1)[:, None]
        found: dict[Pooling, npt.NDArray[np.float32]] = {
            Pooling.FIRST: states[0],
            Pooling.MAX: states.max(0),
            Pooling.MEAN: states.mean(0),
            Pooling.MEAN_SQRT_LEN: states.sum(0) / len(states) ** 0.5,
            Pooling.WEIGHTED_MEAN: (weights * states).sum(0) / weights.sum(),
            Pooling.LAST: states[-1],
        }
        return np.concatenate([found[mode] for mode in pooling]).astype(np.float32)

    @staticmethod
    def logprob(history: Sequence[int]) -> TokenLogprobs:
        return TokenLogprobs(-float(draw("logprob", history, 1000)) / 100.0, 1)

    def _check(self, plan: StepPlan) -> None:
        count = len(plan.rows)
        assert count
        assert count == len(plan.starts) == len(plan.counts) == len(plan.from_device) == len(plan.samples)
        assert len(set(plan.rows)) == count, "a row twice"
        assert len(plan.adapters) in (0, count)
        assert not plan.adapters or max(plan.adapters) >= 0, "adapters without an adapter"
        assert all(row in self.rows for row in plan.rows), "a row that is not open"
        assert all(c >= max(1, s) for c, s in zip(plan.counts, plan.samples, strict=True))
        assert sum(plan.samples) <= self._backend.max_rows, "more draws than rows"
        assert sorted(plan.from_device, reverse=True) == plan.from_device, "decode rows come first"
        assert all(c == 1 and s == 1 for c, s, d in zip(plan.counts, plan.samples, plan.from_device, strict=True) if d)
        assert plan.num_tokens <= max(self._backend.max_batch_tokens, sum(plan.from_device))

    def _check_alone(self, plan: StepPlan, i: int, holders: dict[int, list[tuple[int, int]]]) -> None:
        """Nobody else has the pages that the plan's i-th row writes, but rows after it that read them (a layer writes before any row reads, unless all
        have one token), and rows that this plan gave them to read later."""
        size, slot = self._memory.kv.block_tokens, plan.rows[i]
        for index in range(plan.starts[i] // size, (plan.starts[i] + plan.counts[i] - 1) // size + 1):
            page = self.rows[slot].table[index]
            for other, at in holders[page]:
                if other == slot:
                    continue
                if other in plan.rows:
                    reads = (
                        plan.rows.index(other) > i
                        and plan.starts[plan.rows.index(other)] >= (at + 1) * size
                        and plan.counts[i] > 1
                    )
                else:
                    reads = (other, at, page) in plan.new_blocks
                assert reads, f"page {page} is written by row {slot} while row {other} holds it"

    def _write(self, row: FakeRow, start: int, ids: Sequence[int]) -> None:
        size = self._memory.kv.block_tokens
        for position, token in enumerate(ids, start):
            assert position < self.facts.max_model_len, f"position {position} is past the context"
            page = row.table[position // size]
            assert page // self._memory.kv.pages_per_slab in self._memory.kv_slab, f"page {page} is not mapped"
            self._memory.cells[page, position % size] = (position, token, row.adapter)

    def _read(self, row: FakeRow, end: int) -> list[int]:
        size = self._memory.kv.block_tokens
        history = []
        for position in range(end):
            at, token, adapter = self._memory.cells[row.table[position // size], position % size]
            assert at == position, f"position {position} reads what was written for {at}"
            assert adapter == row.adapter, f"adapter {row.adapter!r} reads what {adapter!r} wrote"
            history.append(token)
        return history
