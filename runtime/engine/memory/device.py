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
    """One device's slabs. Those of an engine that is alone on its device have memory from the start, those of others once they are committed."""

    device: torch.device
    slab_bytes: int
    total_slabs: int

    def reserve(self, num_slabs: int) -> VirtualRange:
        """Addresses for `num_slabs` slabs, nothing mapped."""

    def commit(self, slabs: Sequence[int]) -> None:
        """Take memory for slabs from the driver. Raises if there is not enough, and takes none then."""

    def decommit(self, slabs: Sequence[int]) -> None:
        """Give the memory of slabs back to the driver, after launched work that uses it. Slabs without memory are passed over.

        Raises ValueError if a slab is mapped.
        """

    def tidy(self) -> bool:
        """Do one piece of the work that `unmap` postponed. Returns False if there is none."""

    def close(self) -> None:
        """Give the budget back. All ranges must be closed."""


class SlabLedger:
    """Tracks which slabs have memory and which are mapped. Raises if one is mapped in two places, or without memory."""

    def __init__(self, total_slabs: int, committed: int | None = None) -> None:
        self._mapped = bytearray(total_slabs)
        at_first = total_slabs if committed is None else committed
        self._committed = bytearray([1] * at_first + [0] * (total_slabs - at_first))

    @property
    def num_mapped(self) -> int:
        return sum(self._mapped)

    def take(self, slabs: Sequence[int]) -> None:
        for slab in slabs:
            if not 0 <= slab < len(self._mapped):
                raise ValueError(f"slab {slab} of {len(self._mapped)} does not exist")
            if self._mapped[slab]:
                raise ValueError(f"slab {slab} is mapped already")
            if not self._committed[slab]:
                raise ValueError(f"slab {slab} has no memory")
        if len(set(slabs)) != len(slabs):
            raise ValueError("a slab is named twice")
        for slab in slabs:
            self._mapped[slab] = 1

    def give(self, slabs: Sequence[int]) -> None:
        for slab in slabs:
            self._mapped[slab] = 0

    @property
    def num_committed(self) -> int:
        return sum(self._committed)

    def commit(self, slabs: Sequence[int]) -> None:
        """Note that slabs have memory. Raises ValueError if one had it before."""
        if any(self._committed[slab] for slab in slabs):
            raise ValueError(f"one of the slabs {list(slabs)} has memory already")
        for slab in slabs:
            self._committed[slab] = 1

    def decommit(self, slabs: Sequence[int]) -> list[int]:
        """Note that slabs have no memory any more. Returns those that had. Raises ValueError if one is mapped."""
        if any(self._mapped[slab] for slab in slabs):
            raise ValueError(f"one of the slabs {list(slabs)} is mapped")
        had = [slab for slab in slabs if self._committed[slab]]
        for slab in had:
            self._committed[slab] = 0
        return had
