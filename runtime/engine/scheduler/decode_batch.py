"""The rows of one model that draw a token in every step, kept as parallel arrays so that a step over hundreds costs microseconds.

Knows where each row stands; not why it is here or what it drew.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.engine.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The batch as one step saw it."""

    sequences: list[Sequence]
    ids: list[int]
    histories: list[list[int]]  # the sequences' own token lists
    finals: list[int]  # indices of those that drew their last token


class DecodeBatch:
    """Order is of no meaning; removal puts the last into the gap."""

    def __init__(self, capacity: int) -> None:
        self.sequences: list[Sequence] = []
        self.rows: list[int] = []
        self._ids: list[int] = []
        self._histories: list[list[int]] = []
        self._starts: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._left: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)
        self._room: npt.NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequence: Sequence, start: int, left: int, room: int) -> None:
        """`start` is the position that its next step computes; it will draw `left` more; its blocks hold `room` tokens."""
        place = len(self.sequences)
        sequence.place = place
        self.sequences.append(sequence)
        self.rows.append(sequence.row)
        self._ids.append(sequence.request_id)
        self._histories.append(sequence.tokens)
        self._starts[place], self._left[place], self._room[place] = start, left, room

    def remove(self, sequence: Sequence) -> None:
        place, last = sequence.place, len(self.sequences) - 1
        moved = self.sequences[last]
        columns: tuple[list[Any], ...] = (self.sequences, self.rows, self._ids, self._histories)
        for column in columns:
            column[place] = column[last]
            column.pop()
        for array in (self._starts, self._left, self._room):
            array[place] = array[last]
        moved.place = place
        sequence.place = -1

    def without_room(self) -> list[Sequence]:
        """Those whose next token needs another block."""
        n = len(self.sequences)
        places = np.flatnonzero(self._starts[:n] >= self._room[:n]).tolist()
        return [self.sequences[place] for place in places]

    def start_of(self, sequence: Sequence) -> int:
        return int(self._starts[sequence.place])

    def set_room(self, sequence: Sequence, room: int) -> None:
        self._room[sequence.place] = room

    def kv_tokens(self) -> int:
        return int(self._starts[: len(self.sequences)].sum())

    def starts(self) -> list[int]:
        starts: list[int] = self._starts[: len(self.sequences)].tolist()
        return starts

    def advance(self) -> DecodeRows:
        """A step over all of them is on its way. Those that drew their last leave the batch."""
        n = len(self.sequences)
        self._starts[:n] += 1
        self._left[:n] -= 1
        finals: list[int] = np.flatnonzero(self._left[:n] == 0).tolist()
        rows = DecodeRows(self.sequences.copy(), self._ids.copy(), self._histories.copy(), finals)
        for place in reversed(finals):
            self.remove(rows.sequences[place])
        return rows
