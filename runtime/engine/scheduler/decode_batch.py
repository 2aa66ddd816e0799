"""Holds the rows of one model that draw one token in every step, as parallel arrays so that planning hundreds of rows takes microseconds."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.engine.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The batch at the time of one step."""

    sequences: list[Sequence]
    ids: list[int]
    histories: list[list[int]]  # the sequences' token lists, shared
    finals: list[int]  # indices of the rows that draw their last token
    masked: list[int]  # indices of the rows whose draw waits for a mask


class DecodeBatch:
    """The order has no meaning: removal moves the last row into the gap."""

    def __init__(self, capacity: int) -> None:
        self.sequences: list[Sequence] = []
        self.rows: list[int] = []
        self.slots: list[int] = []  # of the rows' adapters, -1 = none
        self._ids: list[int] = []
        self._histories: list[list[int]] = []
        self._starts: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._left: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._room: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._is_masked: npt.NDArray[np.bool_] = np.zeros(capacity, dtype=np.bool_)
        self._num_masked = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequence: Sequence, start: int, left: int, room: int) -> None:
        """Add a row whose next step computes position `start`, that draws `left` more tokens, and whose blocks hold `room` tokens."""
        index = len(self.sequences)
        sequence.decode_index = index
        self.sequences.append(sequence)
        self.rows.append(sequence.row)
        self.slots.append(sequence.adapter_slot)
        self._ids.append(sequence.request_id)
        self._histories.append(sequence.tokens)
        self._starts[index], self._left[index], self._room[index] = start, left, room
        self._is_masked[index] = sequence.is_masked
        self._num_masked += sequence.is_masked

    def remove(self, sequence: Sequence) -> None:
        index, last = sequence.decode_index, len(self.sequences) - 1
        self._num_masked -= bool(self._is_masked[index])
        moved = self.sequences[last]
        columns: tuple[list[Any], ...] = (self.sequences, self.rows, self.slots, self._ids, self._histories)
        for column in columns:
            column[index] = column[last]
            column.pop()
        for array in (self._starts, self._left, self._room, self._is_masked):
            array[index] = array[last]
        moved.decode_index = index
        sequence.decode_index = -1

    def unmask(self, sequence: Sequence) -> None:
        """Have the row's draws wait for no mask in the steps that are planned from now on."""
        self._num_masked -= bool(self._is_masked[sequence.decode_index])
        self._is_masked[sequence.decode_index] = False

    def without_room(self) -> list[Sequence]:
        """Return the sequences whose next token needs another block."""
        n = len(self.sequences)
        indices = np.flatnonzero(self._starts[:n] >= self._room[:n]).tolist()
        return [self.sequences[index] for index in indices]

    def start_of(self, sequence: Sequence) -> int:
        return int(self._starts[sequence.decode_index])

    def set_room(self, sequence: Sequence, room: int) -> None:
        self._room[sequence.decode_index] = room

    def kv_tokens(self) -> int:
        return int(self._starts[: len(self.sequences)].sum())

    def starts(self) -> list[int]:
        starts: list[int] = self._starts[: len(self.sequences)].tolist()
        return starts

    def masked(self) -> list[int]:
        """Return the indices of the rows whose draw waits for a mask."""
        if not self._num_masked:
            return []
        indices: list[int] = np.flatnonzero(self._is_masked[: len(self.sequences)]).tolist()
        return indices

    def advance(self) -> DecodeRows:
        """Count a step over all rows. Rows that draw their last token leave the batch."""
        n = len(self.sequences)
        self._starts[:n] += 1
        self._left[:n] -= 1
        finals: list[int] = np.flatnonzero(self._left[:n] == 0).tolist()
        rows = DecodeRows(self.sequences.copy(), self._ids.copy(), self._histories.copy(), finals, self.masked())
        for index in reversed(finals):
            self.remove(rows.sequences[index])
        return rows
