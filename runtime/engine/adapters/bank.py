"""The adapters of one base on the device: a range of addresses in which their matrices lie, and the table that kernels find them by.

The range is as long as the device budget, so that addresses never change and CUDA graphs serve any set of adapters. core decides which slabs lie
under it and where in it each adapter begins.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.checkpoint.adapter_layout import AdapterTarget
from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.adapters import AdapterTable
from runtime.engine.memory.device import VirtualRange


class AdapterBank:
    """Implements interfaces.AdapterBank. Use it from the engine thread, except what it says of the base.

    `activation`: of the base's MLPs, where gate and up are one product; None = the base's own code applies it.
    """

    def __init__(
        self,
        memory: VirtualRange,
        targets: Sequence[AdapterTarget],
        dtype: torch.dtype,
        num_slots: int,
        max_rank: int,
        activation: Activation | None,
    ) -> None:
        self.targets = tuple(targets)
        self.dtype = dtype
        self.activation = activation
        self.num_slabs = memory.num_slabs
        self.num_slots = num_slots
        self._memory = memory
        view = memory.bytes_view
        places = torch.zeros((num_slots, max(1, len(self.targets)), 3), dtype=torch.int64, device=view.device)
        self.table = AdapterTable(view.view(dtype), places, max_rank)

    def map(self, index: int, slab: int) -> None:
        self._memory.map(index, [slab])

    def unmap(self, index: int) -> None:
        self._memory.unmap(index, 1)

    def enter(self, slot: int, places: Tensor, offset_bytes: int) -> None:
        """Have the steps launched from now on find an adapter in `slot`: its matrices lie at `places`, counted from `offset_bytes` of the range."""
        row = places.clone()
        row[:, :2] += offset_bytes // self.dtype.itemsize
        if self.table.places.is_cuda:
            row = row.pin_memory().to(self.table.places.device, non_blocking=True)
        self.table.places[slot, : len(self.targets)] = row

    def extent(self, size_bytes: int) -> "Extent":
        """Return an extent of the range, which has no place yet."""
        return Extent(self._memory.bytes_view, size_bytes)

    def close(self) -> None:
        """Give the addresses back. No step may be in flight."""
        self._memory.close()


class Extent:
    """A stretch of a bank's range, whose slabs the bank maps. Implements VirtualRange with no slab of its own."""

    num_slabs = 0

    def __init__(self, whole: Tensor, size_bytes: int) -> None:
        self._whole = whole
        self._size_bytes = size_bytes
        self._offset = 0

    def move(self, offset: int) -> None:
        """Begin at byte `offset` of the range from now on."""
        self._offset = offset

    @property
    def bytes_view(self) -> Tensor:
        return self._whole[self._offset : self._offset + self._size_bytes]

    def map(self, first: int, slabs: Sequence[int]) -> None:
        """Nothing to map: the bank maps slabs under the whole range."""

    def unmap(self, first: int, count: int) -> None:
        """Nothing to unmap."""

    def close(self) -> None:
        """Nothing to give back."""
