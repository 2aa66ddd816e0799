"""Applies the token masks of one step to its logits, with one copy to the device for all rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from runtime.engine.grammar.interfaces import TokenMasks
from runtime.engine.kernels.token_mask import apply_token_masks
from runtime.engine.model.run.logits_processors import LogitsProcessors
from runtime.engine.model.run.row_state import to_device


class StepMaskLines:
    """`words` [len(rows), mask words] holds the mask of each of the row slots `rows`, and may be changed."""

    def __init__(self, rows: Sequence[int], words: TokenMasks) -> None:
        self._rows = rows
        self._words = words
        self._sent: torch.Tensor | None = None

    def limit(self, edits: LogitsProcessors, positions: Mapping[int, int]) -> None:
        """Clear the tokens that the rows' own parameters forbid for draws at `positions`, by row slot."""
        for index, row in enumerate(self._rows):
            if row in edits.limited_rows:
                edits.limit(self._words[index], row, positions[row])

    def apply(self, logits: torch.Tensor, places: Mapping[int, int]) -> None:
        """Mask the lines of `logits` at `places`, by row slot. Slots without a mask are skipped."""
        which = [index for index, row in enumerate(self._rows) if row in places]
        if not which:
            return
        if self._sent is None:
            self._sent = to_device(self._words, logits.device)
        masks = self._sent
        if len(which) < len(self._rows):
            masks = masks.index_select(0, to_device(np.array(which, np.int64), logits.device))
        lines = np.array([places[self._rows[index]] for index in which], np.int64)
        apply_token_masks(logits, to_device(lines, logits.device), masks)
