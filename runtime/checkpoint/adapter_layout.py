"""Lays out the matrices of a packed adapter in memory, in whole or cut to the channels that one device has of its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runtime.checkpoint.safetensors_index import StoredTensor

ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Channels:
    """The inputs or outputs of a linear layer that this device has: `ranges` (start, length), end to end, of all `full`."""

    full: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, count: int) -> "Channels":
        return cls(count, ((0, count),))

    @property
    def count(self) -> int:
        return sum(length for _, length in self.ranges)

    @property
    def is_whole(self) -> bool:
        return self.count == self.full


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A linear layer of a base that adapters may change, by its module path, and what this device has of it."""

    name: str
    inputs: Channels
    outputs: Channels

    @property
    def in_features(self) -> int:
        return self.inputs.count

    @property
    def out_features(self) -> int:
        return self.outputs.count

    @property
    def is_whole(self) -> bool:
        return self.inputs.is_whole and self.outputs.is_whole


class Span(NamedTuple):
    """`size_bytes` from byte `at` of the file, which lie at byte `place` of the image."""

    at: int
    place: int
    size_bytes: int


class ImageLayout:
    """Places matrices one behind the other, each at a multiple of ALIGNMENT_BYTES."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.spans: list[Span] = []

    def add_rows(self, stored: StoredTensor, rows: Channels) -> int:
        """Place some rows of a matrix, and return the byte of the image at which they begin."""
        begin, row_bytes = self.size_bytes, stored.shape[1] * stored.dtype.itemsize
        for start, length in rows.ranges:
            self._copy(stored.offset + start * row_bytes, length * row_bytes)
        self._align()
        return begin

    def add_columns(self, stored: StoredTensor, columns: Channels) -> int:
        """Place some columns of a matrix, row by row, and return the byte of the image at which they begin."""
        if columns.is_whole:
            return self.add_rows(stored, Channels.whole(stored.shape[0]))
        begin, item_bytes = self.size_bytes, stored.dtype.itemsize
        for row in range(stored.shape[0]):
            for start, length in columns.ranges:
                self._copy(stored.offset + (row * columns.full + start) * item_bytes, length * item_bytes)
        self._align()
        return begin

    def _copy(self, at: int, size_bytes: int) -> None:
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.at + last.size_bytes, last.place + last.size_bytes) == (at, self.size_bytes):
            self.spans[-1] = Span(last.at, last.place, last.size_bytes + size_bytes)
        else:
            self.spans.append(Span(at, self.size_bytes, size_bytes))
        self.size_bytes += size_bytes

    def _align(self) -> None:
        self.size_bytes += -self.size_bytes % ALIGNMENT_BYTES


def cut_text(targets: Sequence[AdapterTarget]) -> str:
    """Return text that differs between devices which have different channels; empty if this device has all."""
    if all(target.is_whole for target in targets):
        return ""
    return " ".join(f"{target.name} {target.inputs.ranges} {target.outputs.ranges}" for target in targets)
