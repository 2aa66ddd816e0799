"""Turns a step's output into each sequence's tokens, and decides which sequences end and why."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from runtime.engine.interfaces import NO_TOKEN, RowSetup, StepOutput, StepPlan
from runtime.engine.scheduler.decode_batch import DecodeRows
from runtime.engine.scheduler.pooling import add_pooled, is_finite, pooled_vector
from runtime.engine.scheduler.sequence import Sequence, State
from runtime.ipc.messages import RowTokens, TokenLogprobs
from runtime.types import FinishReason


@dataclass(frozen=True, slots=True)
class Chunk:
    """The known tokens of a sequence that one step computes, and the drafts that follow them.

    Attributes:
        row: the row that the sequence had then.
        draws: tokens that the step draws.
        last: no known token is left to compute.
    """

    sequence: Sequence
    row: int
    draws: int
    last: bool
    drafts: list[int]


@dataclass(slots=True)
class Step:
    """A planned step and its sequences.

    Attributes:
        num_adapters: different adapters of its rows.
        stale: one of its sequences ended after the step was planned.
        void: an earlier step failed, so the step's tokens are dropped.
    """

    number: int
    plan: StepPlan
    opened: list[RowSetup]
    decode: DecodeRows
    prefill: list[Chunk]
    kv_tokens: int
    num_adapters: int = 0
    stale: bool = False
    void: bool = False

    def sequences(self) -> Iterable[Sequence]:
        yield from self.decode.sequences
        for chunk in self.prefill:
            yield chunk.sequence

    def masked_sequences(self) -> list[Sequence]:
        """Return the sequences of `plan.masked`, in its order."""
        rows = self.decode.sequences
        masked = set(self.plan.masked)
        chunks = [c.sequence for c in self.prefill if c.row in masked]
        return [rows[index] for index in self.decode.masked] + chunks


class StopRules:
    """The ids that end sequences of one model.

    Attributes:
        watched: ids that end any live sequence, with the number of sequences; NO_TOKEN is one of them. Most steps need one set operation with them.
    """

    def __init__(self, eos: Iterable[int]) -> None:
        self.eos = frozenset(eos)
        self.watched: dict[int, int] = dict.fromkeys((*self.eos, NO_TOKEN), 1)

    def join(self, sequence: Sequence) -> None:
        for token in sequence.request.stop.stop_token_ids:
            self.watched[token] = self.watched.get(token, 0) + 1

    def leave(self, sequence: Sequence) -> None:
        for token in sequence.request.stop.stop_token_ids:
            self.watched[token] -= 1
            if not self.watched[token]:
                del self.watched[token]

    def suppressed(self, sequence: Sequence) -> tuple[int, ...]:
        """Return the ids that the sampler may not draw before `min_tokens`."""
        if not sequence.request.stop.min_tokens:
            return ()
        eos = frozenset() if sequence.request.stop.ignore_eos else self.eos
        return tuple(sorted(eos | frozenset(sequence.request.stop.stop_token_ids)))

    def ends_on(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token not in self.watched or sequence.num_output_tokens <= sequence.request.stop.min_tokens:
            return None
        if token in sequence.request.stop.stop_token_ids:
            return FinishReason.STOP_TOKEN
        return FinishReason.EOS if token in self.eos and not sequence.request.stop.ignore_eos else None


def outcome(sequence: Sequence, token: int, rules: StopRules) -> tuple[FinishReason | None, int | None]:
    """Return why the sequence ends with this token, which it holds already, and the id that ended it; None if it continues."""
    reason = rules.ends_on(sequence, token)
    if reason is not None:
        return reason, token
    if sequence.mask_source is not None and sequence.mask_source.finished:
        return FinishReason.EOS, token if token in rules.eos else None
    return (at_limit(sequence), None) if sequence.num_output_tokens >= sequence.max_output_tokens else (None, None)


def at_limit(sequence: Sequence) -> FinishReason:
    return (
        FinishReason.LENGTH if sequence.max_output_tokens == sequence.request.stop.max_tokens else FinishReason.CONTEXT
    )


End = Callable[[Sequence, FinishReason], None]
TakeForced = Callable[[Sequence], Iterable[int]]


def settle_decode(
    step: Step, result: StepOutput, rules: StopRules, end: End, take_forced: TakeForced
) -> list[RowTokens]:
    """Return the tokens of all decode rows whose sequence has not ended.

    `take_forced` returns the tokens that follow those of a masked row without a draw.
    """
    batch = step.decode
    tokens = result.tokens
    for history, token in zip(batch.histories, tokens, strict=False):
        history.append(token)
    rows: list[RowTokens | None] = list(map(RowTokens, batch.ids, zip(tokens, strict=False)))
    count = len(rows)
    special: Iterable[int]
    if result.logprobs is not None or step.stale:
        special = range(count)
    else:
        special = {*batch.finals, *batch.masked}
        if not rules.watched.keys().isdisjoint(tokens):
            special.update(i for i, token in enumerate(tokens[:count]) if token in rules.watched)
    for i in special:
        sequence = batch.sequences[i]
        if sequence.state is State.ENDED:
            rows[i] = None
            continue
        if tokens[i] == NO_TOKEN:
            batch.histories[i].pop()
            rows[i] = _not_finite(sequence, "logits")
            end(sequence, FinishReason.ERROR)
            continue
        taken: tuple[int, ...] = (tokens[i],)
        if sequence.mask_source is not None:
            sequence.mask_source.accept(taken)
        reason, stop_token = outcome(sequence, tokens[i], rules)
        if reason is None and sequence.mask_source is not None and (following := take_forced(sequence)):
            forced, reason, stop_token = _append(sequence, following, rules)
            taken += forced
        logprob = result.logprobs[i] if result.logprobs is not None else None
        if reason is not None or logprob is not None or len(taken) > 1:
            rows[i] = RowTokens(batch.ids[i], taken, reason, stop_token, None if logprob is None else (logprob,))
        if reason is not None:
            end(sequence, reason)
    return [row for row in rows if row is not None]


def settle_prefill(
    step: Step, result: StepOutput, rules: StopRules, end: End, take_forced: TakeForced
) -> list[RowTokens]:
    """Return the tokens, vectors and prompt log-probabilities of all rows that are not decode rows. `take_forced`: see `settle_decode`."""
    rows: list[RowTokens] = []
    drawn_at = len(step.decode.ids)
    for chunk in step.prefill:
        sequence, row = chunk.sequence, chunk.row
        at = drawn_at
        drawn_at += chunk.draws
        if sequence.state is State.ENDED:
            continue
        if (
            result.prompt_logprobs is not None
            and row in result.prompt_logprobs
            and sequence.prompt_logprobs is not None
        ):
            sequence.prompt_logprobs.extend(result.prompt_logprobs[row])
        drawn = verified(chunk.drafts, result.tokens[at : at + chunk.draws]) if chunk.draws else []
        if broken := _broken_results(chunk, result, drawn):
            rows.append(_not_finite(sequence, broken))
            end(sequence, FinishReason.ERROR)
            continue
        if result.vectors is not None and (vector := result.vectors.get(row)) is not None:
            add_pooled(sequence, vector)
        if chunk.draws:
            tokens, reason, stop_token = _append(sequence, drawn, rules)
            entries = None if result.logprobs is None else result.logprobs[at : at + len(tokens)]
            if reason is None and sequence.mask_source is not None:
                forced, reason, stop_token = _append(sequence, take_forced(sequence), rules)
                tokens += forced
            rows.append(_first(sequence, tokens, reason, stop_token, entries))
            if chunk.drafts and sequence.state is State.RUNNING:
                sequence.num_computed_tokens = len(sequence.tokens) - 1  # the KV of rejected drafts is written again
        elif chunk.last:  # the request asked for no tokens
            reason = at_limit(sequence)
            rows.append(_first(sequence, (), reason, None, None, pooled_vector(sequence)))
        else:
            continue
        if reason is not None:
            end(sequence, reason)
    return rows


def verified(drafts: list[int], drawn: list[int]) -> list[int]:
    """Return the tokens of `drawn` that follow right drafts only: drawn[i] was drawn after drafts[:i], so it counts if all of these were drawn, too."""
    count = 1
    for draft, token in zip(drafts, drawn, strict=False):
        if draft != token:
            break
        count += 1
    return drawn[:count]


def _broken_results(chunk: Chunk, result: StepOutput, drawn: list[int]) -> str:
    """Name what the step computed for a row and is not finite; empty if all of it is."""
    if NO_TOKEN in drawn:
        return "logits"
    scored = result.prompt_logprobs.get(chunk.row, ()) if result.prompt_logprobs is not None else ()
    if any(entry is not None and math.isnan(entry.logprob) for entry in scored):
        return "log-probabilities of the prompt"
    vector = result.vectors.get(chunk.row) if result.vectors is not None else None
    return "hidden states" if vector is not None and not is_finite(vector) else ""


def _not_finite(sequence: Sequence, what: str) -> RowTokens:
    """Make the row of a sequence that ends because a step computed no numbers for it."""
    text = (
        f"its {what} are infinite or not a number after {sequence.prompt_len} prompt tokens and"
        f" {sequence.num_output_tokens} output tokens; its weights are damaged, or the values exceed what its dtype holds:"
        " check the checkpoint's files, or register the model with dtype float32 or bfloat16"
    )
    return RowTokens(sequence.request_id, (), FinishReason.ERROR, error_code="INTERNAL", error=text)


def _append(
    sequence: Sequence, tokens: Iterable[int], rules: StopRules
) -> tuple[tuple[int, ...], FinishReason | None, int | None]:
    """Append tokens up to the one that ends the sequence. Returns them, the reason and the id that ended it."""
    taken: list[int] = []
    for token in tokens:
        sequence.append(token)
        taken.append(token)
        reason, stop_token = outcome(sequence, token, rules)
        if reason is not None:
            return tuple(taken), reason, stop_token
    return tuple(taken), None, None


def _first(
    sequence: Sequence,
    tokens: tuple[int, ...],
    reason: FinishReason | None,
    stop_token: int | None,
    entries: list[TokenLogprobs | None] | None,
    vector: bytes | None = None,
) -> RowTokens:
    # a row has log-probabilities for all of its tokens or for none
    logprobs = tuple(entry for entry in entries or () if entry is not None) or None
    if sequence.first_token_sent:
        return RowTokens(sequence.request_id, tokens, reason, stop_token, logprobs)
    sequence.first_token_sent = True
    prompt_logprobs = None if sequence.prompt_logprobs is None else tuple(sequence.prompt_logprobs)
    sequence.prompt_logprobs = None
    return RowTokens(
        sequence.request_id,
        tokens,
        reason,
        stop_token,
        logprobs,
        prompt_logprobs,
        sequence.num_cached_tokens,
        queue_s=sequence.queued_s,
        vector=vector,
    )
