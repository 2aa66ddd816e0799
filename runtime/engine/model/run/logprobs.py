"""Computes log-probabilities of drawn tokens and of prompts on the device, for the rows that want them. The host reads them with the step's output.

An entry is the log-softmax of the raw logits, the 1-based rank, and the best alternatives.
"""

from dataclasses import dataclass

import numpy as np
import torch

from runtime.engine.interfaces import RowSetup, StepPlan
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.row_state import to_device, to_host
from runtime.ipc.messages import TokenLogprobs
from runtime.types import LogprobParams

# Rows per pass: float32 copies of the logits are made, and a prompt's chunk has thousands of rows.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Scored:
    """Entries whose copy to the host is queued: [m], [m], [m, n], [m, n] in pinned memory."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    def entries(self, tops: list[int]) -> list[TokenLogprobs | None]:
        """Read the entries, with tops[i] alternatives each."""
        logprobs, ranks, top, ids = (
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top.tolist(),
            self.top_ids.tolist(),
        )
        return [
            TokenLogprobs(logprobs[i], ranks[i], tuple(zip(ids[i][:n], top[i][:n], strict=True)))
            for i, n in enumerate(tops)
        ]


def score(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> Scored:
    """Compute entries of tokens `chosen` [m] int64 under `logits` [m, V], with the `num_top` best, and queue their copy to the host."""
    parts = []
    for begin in range(0, logits.shape[0], _ROWS_AT_ONCE):
        x = logits[begin : begin + _ROWS_AT_ONCE].float()
        mass = x.logsumexp(1, keepdim=True)
        own = x.gather(1, chosen[begin : begin + _ROWS_AT_ONCE, None])
        best, ids = x.topk(min(num_top, x.shape[1]), dim=1)
        parts.append(((own - mass).squeeze(1), (x > own).sum(1) + 1, best - mass, ids))
    return Scored(*(to_host(torch.cat(column)) for column in zip(*parts, strict=True)))


@dataclass(slots=True)
class _PromptPart:
    row: int
    none_first: bool  # the first token has no entry: it is at position 0
    num_entries: int
    num_top: int


class StepLogprobs:
    """The log-probabilities of one step (result_ring.PendingLogprobs)."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._drawn: list[tuple[Scored, list[int], list[int]]] = []
        self._prompt: tuple[Scored | None, list[_PromptPart]] | None = None

    def add_drawn(self, scored: Scored, samples: list[int], tops: list[int], num_samples: int) -> None:
        self._drawn.append((scored, samples, tops))
        self._num_samples = num_samples

    def set_prompt(self, scored: Scored | None, parts: list[_PromptPart]) -> None:
        self._prompt = (scored, parts)

    def generated(self) -> list[TokenLogprobs | None] | None:
        if not self._drawn:
            return None
        found: list[TokenLogprobs | None] = [None] * self._num_samples
        for scored, samples, tops in self._drawn:
            for sample, entry in zip(samples, scored.entries(tops), strict=True):
                found[sample] = entry
        return found

    def prompt(self) -> dict[int, list[TokenLogprobs | None]] | None:
        if self._prompt is None:
            return None
        scored, parts = self._prompt
        entries = scored.entries([part.num_top for part in parts for _ in range(part.num_entries)]) if scored else []
        found: dict[int, list[TokenLogprobs | None]] = {}
        at = 0
        for part in parts:
            nothing: list[TokenLogprobs | None] = [None] if part.none_first else []
            found[part.row] = nothing + entries[at : at + part.num_entries]
            at += part.num_entries
        return found


class LogprobRows:
    """The rows of a model that want log-probabilities, and the logits that a chunk leaves for the next chunk's first token."""

    def __init__(self) -> None:
        self._wants: dict[int, LogprobParams] = {}
        self._carried: dict[int, torch.Tensor] = {}

    def open(self, setup: RowSetup) -> None:
        self.close(setup.row)
        if setup.logprobs.generated is not None or setup.logprobs.prompt is not None:
            self._wants[setup.row] = setup.logprobs

    def close(self, row: int) -> None:
        self._wants.pop(row, None)
        self._carried.pop(row, None)

    def asking(self, shape: StepShape) -> list[int]:
        """Return the samples of the step whose rows want log-probabilities of what they draw."""
        if not self._wants:
            return []
        rows = ((s, self._wants.get(row)) for s, row in enumerate(shape.sample_rows.tolist()))
        return [s for s, wants in rows if wants is not None and wants.generated is not None]

    def tops(self, shape: StepShape, samples: list[int]) -> list[int]:
        return [self._wants[int(shape.sample_rows[s])].generated or 0 for s in samples]

    def prompt_positions(self, plan: StepPlan, shape: StepShape) -> list[int]:
        """Return the tokens of the batch whose logits the prompts' entries need, row by row."""
        return [t for row in plan.prompt_logprobs for t in self._span(plan, shape, row)]

    def score_prompts(self, plan: StepPlan, shape: StepShape, logits: torch.Tensor, job: StepLogprobs) -> None:
        """Queue the entries of this chunk; `logits` [m, V] at `prompt_positions`."""
        rows: list[torch.Tensor] = []
        ids: list[int] = []
        parts: list[_PromptPart] = []
        at = 0
        for row in plan.prompt_logprobs:
            b = plan.rows.index(row)
            span = self._span(plan, shape, row)
            mine = logits[at : at + len(span)]
            at += len(span)
            given = self._given(plan, b)
            carried = self._carried.pop(row, None)
            if carried is not None:
                rows.append(carried)
                ids.append(given[0])
            inner = len(given) - 1
            rows.append(mine[:inner])
            ids += given[1:]
            if len(span) > inner:
                self._carried[row] = mine[inner:].clone()
            wants = self._wants.get(row)
            parts.append(
                _PromptPart(row, carried is None, inner + (carried is not None), (wants and wants.prompt) or 0)
            )
        num_top = max(part.num_top for part in parts)
        scored = score(torch.cat(rows), to_device(np.array(ids, np.int64), logits.device), num_top) if ids else None
        job.set_prompt(scored, parts)

    @staticmethod
    def _span(plan: StepPlan, shape: StepShape, row: int) -> range:
        b = plan.rows.index(row)
        first, end = int(shape.firsts[b]), int(shape.firsts[b + 1])
        return range(
            first, end - 1 if plan.samples[b] else end
        )  # a chunk that is not the last leaves its end to the next one's first token

    @staticmethod
    def _given(plan: StepPlan, b: int) -> list[int]:
        at = sum(count for count, known in zip(plan.counts[:b], plan.from_device[:b], strict=True) if not known)
        return plan.tokens[at : at + plan.counts[b]]
