"""Draws the tokens of a step's rows that need more than the largest logit.

A step's rows fall into three groups: plain greedy rows, which the forward pass draws, rows drawn directly from the logits, and rows drawn from an
edited copy of their logits. Rows with a mask and no other edit are in the second group: the mask is applied to the logits themselves.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from runtime.engine.interfaces import RowSetup, StepPlan
from runtime.engine.kernels import sample
from runtime.engine.model.run.input_buffers import StepShape
from runtime.engine.model.run.logits_processors import LogitsProcessors
from runtime.engine.model.run.mask_lines import StepMaskLines
from runtime.engine.model.run.row_state import RowState, to_device
from runtime.types import SamplingParams

_PLAIN, _RANDOM, _MASKED, _EDITED = range(4)


class Sampler:
    """Draws for one model's open rows by their sampling parameters."""

    def __init__(self, vocab_size: int, tables: RowState) -> None:
        self._tables = tables
        self._edits = LogitsProcessors(vocab_size, tables)
        self._kinds = np.zeros(tables.max_rows, np.uint8)
        self._sorts = np.zeros(tables.max_rows, np.bool_)
        self._unsent: dict[int, SamplingParams] = {}
        self._masked: dict[int, int] = {}  # open rows of the kind _MASKED, and their kind without a mask

    def open(self, setup: RowSetup) -> None:
        """Set up a row. Its rules are sent to the device with the next step."""
        rules = setup.sampling
        row = setup.row
        self._edits.close(row)
        self._unsent.pop(row, None)
        self._sorts[row] = not rules.greedy and (rules.top_k > 0 or rules.top_p < 1 or rules.typical_p < 1)
        self._masked.pop(row, None)
        kind = unmasked = _PLAIN if rules.greedy else _RANDOM
        if self._edits.open(setup):
            kind = _MASKED if self._edits.only_masked(row) else _EDITED
        if kind == _MASKED:
            self._masked[row] = unmasked
        self._kinds[row] = kind
        if kind != _PLAIN:
            self._unsent[row] = rules

    def close(self, row: int) -> None:
        self._edits.close(row)
        self._masked.pop(row, None)
        self._kinds[row] = _PLAIN
        self._unsent.pop(row, None)

    def unmask(self, shape: StepShape, masked: Sequence[int]) -> None:
        """Treat rows like others that draw in this step without being among the `masked` ones: their masks would allow every token from now on."""
        if not self._masked:
            return
        for row in self._masked.keys() & set(shape.sample_rows.tolist()) - set(masked):
            self._kinds[row] = self._masked.pop(row)

    def all_plain(self, shape: StepShape) -> bool:
        """Whether every row draws its largest logit."""
        return not self._kinds[shape.sample_rows].any()

    def begin(self, plan: StepPlan) -> None:
        """Prepare a step: send the rules of new rows, and count the tokens that the host gives to rows with penalties."""
        if self._unsent:
            self._tables.write_rules(list(self._unsent), list(self._unsent.values()))
            self._unsent.clear()
        if plan.tokens and (self._kinds[np.array(plan.rows)] == _EDITED).any():
            at = 0
            for row, start, count, from_device in zip(
                plan.rows, plan.starts, plan.counts, plan.from_device, strict=True
            ):
                if not from_device:
                    self._edits.note_given(row, start, plan.tokens[at : at + count])
                    at += count

    def draw(
        self,
        logits: torch.Tensor,
        shape: StepShape,
        drawn: torch.Tensor,
        masks: StepMaskLines | None,
        kept: Collection[int] = (),
    ) -> None:
        """Overwrite `drawn` [S] int64 for the rows that are not plain.

        `logits` [S or more, V] belong to the step's samples. Those of masked rows are masked in place, but for the samples `kept`.
        """
        kinds = self._kinds[shape.sample_rows].tolist()
        special = [s for s, kind in enumerate(kinds) if kind != _PLAIN]
        rows, positions = shape.sample_rows.tolist(), shape.sample_positions.tolist()
        copied = set(kept)
        edited = [
            s
            for s in special
            if (kinds[s] == _MASKED and s in copied)
            or (kinds[s] == _EDITED and self._edits.active(rows[s], positions[s]))
        ]
        changed = set(edited)
        direct = [s for s in special if s not in changed]
        if masks is not None:
            masks.limit(self._edits, dict(zip(rows, positions, strict=True)))
            masks.apply(logits, {rows[s]: s for s in direct if kinds[s] == _MASKED})
        if direct:
            self._draw(logits, direct, direct, rows, positions, drawn)
        if edited:
            self._draw(
                self._edited(logits, edited, rows, positions, masks),
                list(range(len(edited))),
                edited,
                rows,
                positions,
                drawn,
            )
            self._edits.note_drawn([rows[s] for s in edited], [positions[s] for s in edited], edited, drawn)

    def _edited(
        self,
        logits: torch.Tensor,
        samples: list[int],
        rows: list[int],
        positions: list[int],
        masks: StepMaskLines | None,
    ) -> torch.Tensor:
        scores = logits.index_select(0, to_device(np.array(samples, np.int64), logits.device)).float()
        self._edits.apply(scores, [rows[s] for s in samples], [positions[s] for s in samples])
        if masks is not None:
            masks.apply(scores, {rows[s]: line for line, s in enumerate(samples)})
        return scores

    def _draw(
        self,
        logits: torch.Tensor,
        source: Sequence[int],
        samples: list[int],
        rows: list[int],
        positions: list[int],
        drawn: torch.Tensor,
    ) -> None:
        slots = [rows[s] for s in samples]
        words = np.array([source, samples, slots, [positions[s] for s in samples]], np.int64)
        where, target, slot, position = to_device(words, logits.device)
        sample.draw(
            logits, where, target, slot, position, self._tables.rules, drawn, sorts=bool(self._sorts[slots].any())
        )
