"""Interface of device memory: slabs of physical memory that are mapped under virtual ranges.

Slabs are numbered 0 … total_slabs-1. The slab pool lends them. Addresses never change while a range exists.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class VirtualRange(Protocol):
    """Addresses for `num_slabs` slabs. Touching an unmapped part is an error (a GPU faults; a CPU reads zeros)."""

    num_slabs: int

    @property
    def bytes_view(self) -> torch.Tensor:
        """The whole range as uint8. Its address never changes."""

    def map(self, first: int, slabs: Sequence[int]) -> None:
        """Put `slabs` at places first, first + 1, …; the places must be empty and the slabs mapped nowhere."""

    def unmap(self, first: int, count: int) -> None:
        """Empty `count` places. Work already launched may still use them; their contents are lost once it has passed."""

    def close(self) -> None:
        """Unmap everything and give the addresses back. Waits for launched work."""


class DeviceMemory(Protocol):
    """One device's budget of slabs, taken once and kept."""

    device: torch.device
    slab_bytes: int
    total_slabs: int

    def reserve(self, num_slabs: int) -> VirtualRange:
        """Addresses for `num_slabs` slabs, nothing mapped."""

    def tidy(self) -> bool:
        """Do one piece of the work that `unmap` postponed. Returns False if there is none."""

    def close(self) -> None:
        """Give the budget back. All ranges must be closed."""


class SlabLedger:
    """Tracks which slabs are mapped, and raises if one is mapped in two places."""

    def __init__(self, total_slabs: int) -> None:
        self._mapped = bytearray(total_slabs)

    @property
    def num_mapped(self) -> int:
        return sum(self._mapped)

    def take(self, slabs: Sequence[int]) -> None:
        for slab in slabs:
            if not 0 <= slab < len(self._mapped):
                raise ValueError(f"slab {slab} of {len(self._mapped)} does not exist")
            if self._mapped[slab]:
                raise ValueError(f"slab {slab} is mapped already")
        if len(set(slabs)) != len(slabs):
            raise ValueError("a slab is named twice")
        for slab in slabs:
            self._mapped[slab] = 1

    def give(self, slabs: Sequence[int]) -> None:
        for slab in slabs:
            self._mapped[slab] = 0
