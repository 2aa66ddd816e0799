"""Interfaces of a weight image in memory and of the reader that fills it from files."""

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor


class WeightBuffer(Protocol):
    """Host memory that holds an image, in one piece or several."""

    def pieces(self, offset: int, size_bytes: int) -> Iterable[Tensor]:
        """Return the bytes from `offset` as uint8 tensors, in order, cut between elements of any type."""


class Contiguous:
    """An image in one piece. Implements WeightBuffer."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def pieces(self, offset: int, size_bytes: int) -> Iterable[Tensor]:
        yield self._memory[offset : offset + size_bytes]


class Filler(Protocol):
    """Reads one model's image from files, any number of times.

    Attributes:
        group_ends: byte offsets at which groups of layers end, ascending; the last is the image's size.
    """

    group_ends: tuple[int, ...]

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        """Fill the whole image; `on_group(i)` is called from this thread, in order, once groups 0 … i are in.

        Raises LoadFailed (a file is gone or too short) or Cancelled.
        """
