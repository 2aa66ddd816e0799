"""Schedules one model's sequences: which ones run, what the next step computes, and what its output means.

There are no phases. A sequence has tokens that are computed and tokens that are not; decode rows come first, and chunks of other rows fill the rest
of the token budget. A step is planned before the output of the previous one is known, so a row may be planned once more than needed; that token is
dropped. The end by a token limit is known beforehand and never overrun. A masked row is planned ahead, too, since only its draw waits for the mask. Rows
in lockstep (with drafts or forced tokens) are planned only after their last token is known.
"""

from collections.abc import Iterable

from runtime.engine.interfaces import NO_TOKEN, Drafter, StepOutput, StepPlan
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.scheduler.adapter_use import count_adapters
from runtime.engine.scheduler.admission import blocks_for
from runtime.engine.scheduler.decode_batch import DecodeBatch
from runtime.engine.scheduler.limits import Limits
from runtime.engine.scheduler.lockstep_rows import LockstepRows
from runtime.engine.scheduler.outputs import Chunk, Step, StopRules, settle_decode, settle_prefill
from runtime.engine.scheduler.pooling import pooled_spans
from runtime.engine.scheduler.row_pool import ModelRows
from runtime.engine.scheduler.running_rows import RunningRows
from runtime.engine.scheduler.sequence import Sequence, State
from runtime.engine.scheduler.speculation import Speculation
from runtime.engine.scheduler.totals import Totals
from runtime.engine.scheduler.waiting_queue import WaitingQueue
from runtime.ipc.messages import RowTokens
from runtime.types import FinishReason

# Prompt tokens with log-probabilities per step. Each leaves a row of logits: a quarter of a megabyte with a vocabulary of 128k.
SCORED_TOKENS = 1024


class Scheduler:
    """Plans one model's steps and applies their outputs. `drafter`: None = no speculation."""

    def __init__(self, eos: Iterable[int], cache: PrefixCache, rows: ModelRows, drafter: Drafter | None = None) -> None:
        self.totals = Totals()
        self.waiting = WaitingQueue()
        self._cache = cache
        self._speculation = Speculation(drafter)
        self._block_tokens = cache.blocks.geometry.block_tokens
        self._rules = StopRules(eos)
        self._decode = DecodeBatch(rows.total)
        self._prefill: list[Sequence] = []
        self._lockstep = LockstepRows()
        self._live: dict[int, Sequence] = {}
        self._flying: list[Step] = []
        self._planned = 0
        self._settled = 0
        self._running = RunningRows(cache, rows)
        self._score_budget = SCORED_TOKENS

    @property
    def running(self) -> int:
        """The number of sequences with a row, including those whose last token is in flight."""
        return len(self._running)

    def decoding(self) -> tuple[int, int, int]:
        """Return the number of rows past their prompts, the tokens that they hold, and the number of their different adapters."""
        adapters = count_adapters((*self._decode.slots, *(sequence.adapter_slot for sequence in self._lockstep)))
        return len(self._decode) + len(self._lockstep), self._decode.kv_tokens() + self._lockstep.kv_tokens(), adapters

    @property
    def promised_blocks(self) -> int:
        """Blocks on which the last admission relied."""
        return self._running.reservations.promised_blocks

    def promise(self, blocks: int) -> None:
        """Keep `blocks` for the first waiting sequence. Does nothing while sequences run: admission has counted their blocks."""
        if not self._running:
            self._running.reservations.promised_blocks = blocks

    def sequences(self) -> list[Sequence]:
        return list(self._live.values())

    def find(self, request_id: int) -> Sequence | None:
        return self._live.get(request_id)

    def add(self, sequence: Sequence) -> None:
        self._live[sequence.request_id] = sequence
        for totals in self._totals_of(sequence):
            totals.prompt_tokens += sequence.prompt_len
        sequence.count_adapter(live=1)
        self._rules.join(sequence)
        self.waiting.push(sequence)

    def _totals_of(self, sequence: Sequence) -> Iterable[Totals]:
        """Return the counters that a sequence adds to: the model's, and its adapter's."""
        return (self.totals,) if sequence.adapter is None else (self.totals, sequence.adapter.totals)

    def blocks_wanted(self, token_budget: int) -> int:
        """Return how many blocks the next plan would allocate if all were free."""
        pending = sum(len(s.tokens) - s.num_computed_tokens for s in self._prefill)
        head = self.waiting.head()
        if head is not None and self._running.num_free:
            pending += len(head.tokens)
        wanted = len(self._without_room()) + len(self._prefill)
        return wanted + blocks_for(min(pending, token_budget), self._block_tokens)

    def pending_tokens(self) -> int:
        """Return the known tokens that no step has computed: of running sequences and of the first waiting one."""
        head = self.waiting.head()
        return len(self._decode) + self._prompt_tokens_left() + (len(head.tokens) if head is not None else 0)

    def lacks_block(self) -> bool:
        """Whether a row past its prompt needs another block for its next token."""
        return bool(self._without_room())

    def steps_left(self) -> tuple[int, int]:
        """Return the expected steps until the first and until the last running sequence ends; (0, 0) if none runs."""
        return self._running.reservations.steps_left(self._running.sequences)

    def starved(self) -> Sequence | None:
        """Return the first sequence that lacks room, after an empty plan with nothing in flight."""
        if self._flying:
            return None
        return min(self._prefill, key=lambda s: s.order, default=None) or self.waiting.head()

    # Planning -------------------------------------------------------------------------------------------------------------------------------

    def plan(self, limits: Limits, now: float) -> Step | None:
        """Plan the next step. Returns None if no sequence can advance."""
        preemptions = self.totals.preemptions
        self._give_decode_blocks(now)
        count = len(self._decode)
        plan = StepPlan(self._decode.rows.copy(), self._decode.starts(), [1] * count, [True] * count, [1] * count, [])
        plan.masked.extend(plan.rows[index] for index in self._decode.masked())
        kv_tokens = self._decode.kv_tokens()
        budget = limits.token_budget - count
        self._score_budget = SCORED_TOKENS
        self._speculation.begin_step(self._running.num_free - len(self.waiting))  # every row that runs may draw a token
        chunks: list[Chunk] = []
        for sequence in (*self._lockstep, *self._prefill):
            if budget <= 0:
                break
            budget -= self._plan_chunk(sequence, budget, plan, chunks)
        admitted = 0
        # Do not re-admit a sequence that was preempted in this step.
        while (
            budget > 0
            and admitted < limits.admit_rows
            and self._running.num_free
            and self.totals.preemptions == preemptions
        ):
            head = self.waiting.head()
            if head is None or not self._admit(head, limits, limits.token_budget - budget, now):
                break
            admitted += 1
            budget -= self._plan_chunk(head, budget, plan, chunks)
        if not plan.rows:
            if len(self._prefill) > 1 and not self._flying:
                self.preempt_newest(now)
            return None
        kv_tokens += sum(chunk.sequence.num_computed_tokens for chunk in chunks)
        slots = [*self._decode.slots, *(chunk.sequence.adapter_slot for chunk in chunks)]
        num_adapters = count_adapters(slots)
        if num_adapters:
            plan.adapters.extend(slots)
        opened, new_blocks = self._running.take_changes()
        plan.new_blocks.extend(new_blocks)
        decode = self._decode.advance()
        self._planned += 1
        self._start_decoding(chunks)
        step = Step(self._planned, plan, opened, decode, chunks, kv_tokens, num_adapters)
        self._flying.append(step)
        return step

    def _give_decode_blocks(self, now: float) -> None:
        """Give a block to each decode row that has none for its next token. Where there is no room, the newest rows are preempted."""
        wanting = self._without_room()
        if len(wanting) > 1:
            wanting.sort(key=lambda s: s.order)
        for sequence in wanting:
            decodes = sequence.decode_index >= 0
            computed = self._decode.start_of(sequence) if decodes else sequence.num_computed_tokens
            self._running.publish(sequence, computed)
            while sequence.state is State.RUNNING:  # until it is preempted itself
                if self._running.add_block(sequence):
                    if decodes:
                        self._decode.set_room(sequence, len(sequence.block_ids) * self._block_tokens)
                    break
                self.preempt_newest(now)

    def _without_room(self) -> list[Sequence]:
        """Return the rows past their prompts whose next token needs another block."""
        return self._decode.without_room() + self._lockstep.without_room(self._block_tokens)

    def _plan_chunk(self, sequence: Sequence, budget: int, plan: StepPlan, chunks: list[Chunk]) -> int:
        """Plan as many of the sequence's tokens as budget and blocks allow. Returns the number."""
        start, total = sequence.num_computed_tokens, len(sequence.tokens)
        scored = sequence.wants_prompt_logprobs and start < sequence.prompt_len
        end = min(total, start + (min(budget, self._score_budget) if scored else budget))
        drafts = self._speculation.propose(sequence, budget - (end - start)) if end == total > start else []
        end += len(drafts)
        end = self._running.add_blocks(sequence, end)
        if end <= start:
            return 0
        known_end = min(end, total)
        del drafts[end - known_end :]
        draws = 1 + len(drafts) if known_end == total and sequence.max_output_tokens > 0 else 0
        plan.rows.append(sequence.row)
        plan.starts.append(start)
        plan.counts.append(end - start)
        plan.from_device.append(False)
        plan.samples.append(draws)
        if draws and sequence.is_masked:
            plan.masked.append(sequence.row)
        if sequence.request.pooling:
            plan.pooled.extend((sequence.row, *span) for span in pooled_spans(sequence, start, known_end))
        plan.tokens.extend(sequence.tokens[start:known_end])
        plan.tokens.extend(drafts)
        if scored:
            plan.prompt_logprobs.append(sequence.row)
            self._score_budget -= end - start
        chunks.append(Chunk(sequence, sequence.row, draws, known_end == total, drafts))
        sequence.num_computed_tokens = end
        # A later row of this plan may share these blocks: a layer writes K and V of the whole step before any row reads them. This does not hold for a
        # single token: where every row has one, a row reads the KV of the others before the layer writes it (gpu/attention_cuda.py).
        if end - start > 1:
            self._running.publish(sequence, end)
        return end - start

    def _start_decoding(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            if not chunk.last:
                continue
            left = sequence.max_output_tokens - sequence.num_output_tokens - 1
            drafts = self._speculation.covers(sequence)
            if sequence not in self._lockstep:
                self._prefill.remove(sequence)
                if drafts and left > 0:
                    self._lockstep.add(sequence)
            elif not drafts or left <= 0:
                self._lockstep.discard(sequence)
            if not drafts and left > 0:
                self._decode.add(sequence, len(sequence.tokens), left, len(sequence.block_ids) * self._block_tokens)

    # Admission ------------------------------------------------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence, limits: Limits, planned: int, now: float) -> bool:
        """Admit a sequence to a plan of `planned` tokens so far. Returns False if it must wait."""
        if sequence.blocked_until_step > self._settled:
            return False
        hits = self._running.hits_if_room(sequence, limits.room, now)
        if hits is None:
            return False
        self.waiting.discard(sequence)
        launched = sum(step.plan.num_tokens for step in self._flying)
        queued = planned + launched + self._prompt_tokens_left()
        self._running.open(sequence, hits, self._rules.suppressed(sequence), now, limits.kv_return, queued)
        self._prefill.append(sequence)
        if not sequence.first_token_sent:
            cached_tokens = min(sequence.num_computed_tokens, sequence.prompt_len)
            for totals in self._totals_of(sequence):
                totals.prefix_hit_tokens += cached_tokens - sequence.num_cached_tokens
            sequence.num_cached_tokens = cached_tokens
            sequence.prompt_logprobs = [] if sequence.wants_prompt_logprobs else None
        if sequence.queued_s is None:
            sequence.queued_s = now - sequence.arrived_s
        return True

    def _prompt_tokens_left(self) -> int:
        """Return the tokens of running sequences' prompts that no step has."""
        return sum(len(sequence.tokens) - sequence.num_computed_tokens for sequence in self._prefill)

    # Results and ends -----------------------------------------------------------------------------------------------------------------------

    def settle(self, step: Step, result: StepOutput, now: float) -> list[RowTokens]:
        """Apply a step's output. Returns the new tokens of every sequence that has not ended."""
        self._take_off(step)
        self.totals.steps += 1
        self.totals.step_seconds += result.device_us * 1e-6
        if step.void:
            return []

        def end(sequence: Sequence, reason: FinishReason) -> None:
            self.end(sequence, now)

        def take_forced(sequence: Sequence) -> Iterable[int]:
            return self._lockstep.take_forced(sequence, self._decode, in_flight=bool(self._flying))

        rows = settle_decode(step, result, self._rules, end, take_forced)
        has_one_each = not step.decode.masked and NO_TOKEN not in result.tokens
        self.totals.generated_tokens += len(rows) if has_one_each else sum(len(row.tokens) for row in rows)
        if step.prefill:
            others = settle_prefill(step, result, self._rules, end, take_forced)
            self.totals.generated_tokens += sum(len(row.tokens) for row in others)
            rows += others
        if step.plan.masked:
            self._unmask(step.masked_sequences())
        return rows

    def _unmask(self, sequences: Iterable[Sequence]) -> None:
        """Plan the draws of sequences whose masks allow every token from now on as those of rows without masks."""
        for sequence in sequences:
            if sequence.is_masked and sequence.state is not State.ENDED and sequence.allows_all:
                sequence.is_unmasked = True
                if sequence.decode_index >= 0:
                    self._decode.unmask(sequence)

    def fail(self, step: Step, now: float) -> list[Sequence]:
        """End the sequences of a step that failed, and return them.

        All other sequences are preempted, because they may have read KV that the step did not write.
        """
        self._take_off(step)
        if step.void:
            return []
        lost = [sequence for sequence in step.sequences() if sequence.state is not State.ENDED]
        for sequence in lost:
            self.end(sequence, now)
        for sequence in sorted(self._running.sequences, key=lambda s: s.order):
            self._preempt(sequence, now)
        for later in self._flying:
            later.void = True
        self._cache.forget()
        return lost

    def _take_off(self, step: Step) -> None:
        self._flying.remove(step)
        self._settled = max(self._settled, step.number)

    def end(self, sequence: Sequence, now: float) -> None:
        """End a sequence in any state and release its row and blocks."""
        if sequence.state is State.RUNNING:
            self._leave_row(sequence, now)
            self._running.reservations.record_length(sequence)
        else:
            self.waiting.discard(sequence)
            self.promise(0)
        sequence.state = State.ENDED
        sequence.count_adapter(live=-1, generated_tokens=sequence.num_output_tokens)
        self._rules.leave(sequence)
        del self._live[sequence.request_id]
        for step in self._flying:
            step.stale = True

    def foremost(self) -> tuple[int, int] | None:
        """Return the order of the model's first sequence, running or waiting."""
        head = self.waiting.head()
        return min((s.order for s in (*self._running.sequences, *((head,) if head else ()))), default=None)

    def preempt_newest(self, now: float, newer_than: tuple[int, int] | None = None) -> bool:
        """Preempt the running sequence that is last in order; it keeps its output. Returns False if none (after `newer_than`) runs."""
        newest = max((*self._decode.sequences, *self._lockstep, *self._prefill), key=lambda s: s.order, default=None)
        if newest is None or (newer_than is not None and newest.order <= newer_than):
            return False
        self._preempt(newest, now)
        return True

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._leave_row(sequence, now)
        sequence.state = State.WAITING
        sequence.blocked_until_step = self._planned
        self.waiting.push(sequence)
        for totals in self._totals_of(sequence):
            totals.preemptions += 1

    def _leave_row(self, sequence: Sequence, now: float) -> None:
        # The last known token may not have been computed, nor tokens that a grammar forced.
        computed = len(sequence.tokens) - 1
        if sequence.decode_index < 0:
            computed = min(computed, sequence.num_computed_tokens)
        self._running.publish(sequence, computed)
        if sequence.decode_index >= 0:
            self._decode.remove(sequence)
        elif sequence in self._prefill:
            self._prefill.remove(sequence)
        self._lockstep.discard(sequence)
        self._running.close(sequence, now)

    def check(self) -> None:
        """Raise AssertionError unless all blocks in use belong to running sequences."""
        self._running.check()
