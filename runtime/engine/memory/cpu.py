"""Slabs on a CPU: ranges are anonymous memory that the kernel backs on first touch, so mapping is counting and unmapping gives pages back."""

import mmap
import sys
from collections.abc import Sequence

import torch

from runtime.engine.memory.device import SlabLedger, VirtualRange

# Python names it from 3.13 on; this is Linux's value, elsewhere it has no effect that we need
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class CpuMemory:
    """A budget of `total_slabs` slabs of ordinary memory, `committed` of them at first (None = all). Implements DeviceMemory."""

    def __init__(self, slab_bytes: int, total_slabs: int, committed: int | None = None) -> None:
        if slab_bytes % mmap.PAGESIZE:
            raise ValueError(f"slab_bytes {slab_bytes} is not a multiple of the page size {mmap.PAGESIZE}")
        self.device = torch.device("cpu")
        self.slab_bytes = slab_bytes
        self.total_slabs = total_slabs
        self.ledger = SlabLedger(total_slabs, committed)

    def reserve(self, num_slabs: int) -> VirtualRange:
        return CpuRange(self.slab_bytes, num_slabs, self.ledger)

    def commit(self, slabs: Sequence[int]) -> None:
        self.ledger.commit(slabs)

    def decommit(self, slabs: Sequence[int]) -> None:
        self.ledger.decommit(slabs)

    def tidy(self) -> bool:
        return False

    def close(self) -> None:
        pass


class CpuRange:
    """Implements VirtualRange."""

    def __init__(self, slab_bytes: int, num_slabs: int, ledger: SlabLedger) -> None:
        self.num_slabs = num_slabs
        self._slab_bytes = slab_bytes
        self._ledger = ledger
        self._at: list[int | None] = [None] * num_slabs
        # NORESERVE: a range is as long as the budget, and a host may count reserved memory as used
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._pages = mmap.mmap(-1, max(num_slabs, 1) * slab_bytes, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self._view = torch.frombuffer(self._pages, dtype=torch.uint8)

    @property
    def bytes_view(self) -> torch.Tensor:
        return self._view

    def map(self, first: int, slabs: Sequence[int]) -> None:
        if any(self._at[place] is not None for place in range(first, first + len(slabs))):
            raise ValueError(f"places {first} to {first + len(slabs) - 1} are not all empty")
        self._ledger.take(slabs)
        self._at[first : first + len(slabs)] = slabs

    def unmap(self, first: int, count: int) -> None:
        slabs = [slab for slab in self._at[first : first + count] if slab is not None]
        self._ledger.give(slabs)
        self._at[first : first + count] = [None] * count
        self._pages.madvise(mmap.MADV_DONTNEED, first * self._slab_bytes, count * self._slab_bytes)

    def close(self) -> None:
        self.unmap(0, self.num_slabs)
        # tensors over the range may outlive it, so its addresses stay until the last one goes; its pages are gone already
        self._view = torch.empty(0, dtype=torch.uint8)
