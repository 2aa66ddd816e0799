"""Holds the token masks of one step, and applies them to its logits with one copy to the device for all rows."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from runtime.engine.grammar.interfaces import TokenMasks
from runtime.engine.kernels.token_mask import apply_token_masks
from runtime.engine.model.run.logits_processors import LogitsProcessors
from runtime.engine.model.run.row_state import to_device

_LEAST_LINES = 16


class MaskMemory:
    """Host memory for the masks of one model's steps: pinned, where the device copies from it."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self._num_words = num_words
        self._pins = device.type == "cuda"
        self._lines: TokenMasks = np.empty((0, num_words), np.int32)

    def lines(self, count: int) -> TokenMasks:
        """Return `count` lines [count, num_words] with any content. Every call returns the same memory, unless it must grow."""
        if count > len(self._lines):
            capacity = max(_LEAST_LINES, 1 << (count - 1).bit_length())
            self._lines = torch.empty((capacity, self._num_words), dtype=torch.int32, pin_memory=self._pins).numpy()
        return self._lines[:count]


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
