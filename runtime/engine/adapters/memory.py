"""One loaded adapter's memory: its packed matrices in a tier, and, while it is resident, at a place in its base's bank."""

from collections.abc import Sequence
from typing import Protocol

from runtime.checkpoint.packed_adapter import AdapterImage
from runtime.engine.adapters.bank import AdapterBank, Extent


class ExtentWeights(Protocol):
    """The bytes of an adapter over an extent, as memory's models of weights move them between tiers."""

    def swap_in(self, slabs: Sequence[int]) -> None: ...

    def swap_in_done(self) -> bool: ...

    def wait(self, group: int) -> None:
        """Raise the error that ended the copy."""

    def evict(self) -> None: ...

    def host_bytes(self) -> int: ...

    def drop_host(self) -> None: ...

    def close(self) -> None: ...


class AdapterMemory:
    """Implements interfaces.AdapterMemory."""

    def __init__(self, bank: AdapterBank, image: AdapterImage, extent: Extent, weights: ExtentWeights) -> None:
        self.size_bytes = image.size_bytes
        self.digest = image.digest
        self._bank = bank
        self._image = image
        self._extent = extent
        self._weights = weights

    def swap_in(self, slot: int, offset: int) -> None:
        self._extent.move(offset)
        self._bank.enter(slot, self._image.places, offset)
        self._weights.swap_in(())

    def swap_in_done(self) -> bool:
        if not self._weights.swap_in_done():
            return False
        self._weights.wait(0)
        return True

    def wait(self) -> None:
        self._weights.wait(0)

    def evict(self) -> None:
        self._weights.evict()

    def host_bytes(self) -> int:
        return self._weights.host_bytes()

    def drop_host(self) -> None:
        self._weights.drop_host()

    def close(self) -> None:
        self._weights.close()
