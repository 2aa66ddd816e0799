"""Holds the device's state of every row slot between steps: the last drawn token, the page table and the sampling rules.

A slot belongs to one model at a time and all steps run in one order, so the models of an engine share the tables.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from runtime.types import SamplingParams

# Words of a row's rules (int32; F: the bits of a float32). kernels/sample.py reads them by these numbers.
TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, SEED_LOW, SEED_HIGH, REPETITION, FREQUENCY, PRESENCE = range(10)
NUM_WORDS = 12


class RowState:
    """Tensors indexed by row slot; their addresses never change.

    Attributes:
        last_token: [max_rows] int64, the token drawn last.
        rules: [max_rows, NUM_WORDS] int32; only rows that do more than plain greedy drawing ever write or read theirs.
    """

    def __init__(self, device: torch.device, max_rows: int) -> None:
        self.device = device
        self.max_rows = max_rows
        self.last_token = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.rules = torch.zeros((max_rows, NUM_WORDS), dtype=torch.int32, device=device)
        self._page_tables: dict[int, torch.Tensor] = {}

    def page_table(self, num_pages: int) -> torch.Tensor:
        """Return a table of at least `num_pages` entries per row, [max_rows, W] int32. Models with the same W, a power of two, share one."""
        width = max(16, 1 << (num_pages - 1).bit_length())
        table = self._page_tables.get(width)
        if table is None:  # setdefault, because two loading threads may get here at once
            table = self._page_tables.setdefault(
                width, torch.zeros((self.max_rows, width), dtype=torch.int32, device=self.device)
            )
        return table

    def enter_blocks(self, table: torch.Tensor, blocks: Sequence[tuple[int, int, int]]) -> None:
        """Write (row slot, index, page id) entries into a page table: those for which a step's upload has no room."""
        row, index, page = to_device(np.array(blocks, np.int64).T.copy(), self.device)
        table[row, index] = page.int()

    def write_rules(self, rows: list[int], rules: list[SamplingParams]) -> None:
        """Set rows' rules, after all steps launched so far."""
        words = np.stack([_words(rule) for rule in rules])
        self.rules.index_copy_(0, to_device(np.asarray(rows, np.int64), self.device), to_device(words, self.device))


def to_device(array: "npt.NDArray[np.generic]", device: torch.device) -> torch.Tensor:
    """Copy `array` to the device without waiting for it.

    If the array is in pinned memory, it must keep its content until the transfer is over. Of another one torch keeps a pinned copy until then.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queue a copy of `tensor` to pinned memory and return it. The values are there once the step is over."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _words(rule: SamplingParams) -> npt.NDArray[np.int32]:
    words = np.zeros(NUM_WORDS, np.int32)
    floats = words.view(np.float32)
    floats[TEMPERATURE] = rule.temperature
    words[TOP_K] = max(0, rule.top_k)
    floats[TOP_P] = rule.top_p
    floats[MIN_P] = rule.min_p
    floats[TYPICAL_P] = rule.typical_p
    seed = rule.seed & 0xFFFF_FFFF_FFFF_FFFF
    words.view(np.uint32)[SEED_LOW] = seed & 0xFFFF_FFFF
    words.view(np.uint32)[SEED_HIGH] = seed >> 32
    floats[REPETITION] = rule.repetition_penalty
    floats[FREQUENCY] = rule.frequency_penalty
    floats[PRESENCE] = rule.presence_penalty
    return words
