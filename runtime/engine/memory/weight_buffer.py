"""A weights image on the host, and what fills it: the seam between memory and files. Knows bytes; nothing of tensors' names or of models."""

import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor


class WeightBuffer(Protocol):
    """Host memory that holds an image, in one piece or several."""

    def pieces(self, offset: int, size_bytes: int) -> Iterable[Tensor]:
        """The bytes from `offset` as uint8 tensors, in order; cuts lie where every tensor element respects them."""


class Contiguous:
    """An image in one piece. Implements WeightBuffer."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def pieces(self, offset: int, size_bytes: int) -> Iterable[Tensor]:
        yield self._memory[offset : offset + size_bytes]


class Filler(Protocol):
    """Brings one model's image in from files, as often as it is asked.

    Attributes:
        group_ends: byte offsets at which groups of layers end, ascending; the last is the image's size.
    """

    group_ends: tuple[int, ...]

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        """Fill the whole image; `on_group(i)` is called from this thread, in order, once groups 0 … i are in.

        Raises LoadFailed (a file is gone or too short) or Cancelled.
        """
