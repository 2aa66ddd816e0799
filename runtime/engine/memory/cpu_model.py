"""The memory of loaded models and adapters on a CPU: weights are read from files straight into the mapped range."""

from collections.abc import Sequence

from torch import Tensor

from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.background_load import BackgroundLoad
from runtime.engine.memory.cpu_host_kv import CpuHostKv
from runtime.engine.memory.device import VirtualRange
from runtime.engine.memory.kv_range import KvRange
from runtime.engine.memory.weight_buffer import Contiguous, Filler


class CpuWeights:
    """The weights of a model, or the matrices of an adapter, over `weights`. Implements WeightReadiness."""

    def __init__(self, weights: VirtualRange, filler: Filler) -> None:
        self.weight_slabs = weights.num_slabs
        self.weight_bytes = filler.group_ends[-1]
        self._weights = weights
        self._filler = filler
        self._filling: BackgroundLoad | None = None
        self._pending = True

    @property
    def weights_view(self) -> Tensor:
        return self._weights.bytes_view

    @property
    def pending(self) -> bool:
        return self._pending

    def wait(self, group: int) -> None:
        if self._filling is None:
            raise RuntimeError("a model that is not resident was asked to run")
        self._filling.wait(group)
        self.swap_in_done()

    def swap_in(self, slabs: Sequence[int]) -> None:
        self._weights.map(0, slabs)
        self._filling = BackgroundLoad(self._filler, Contiguous(self._weights.bytes_view))

    def swap_in_done(self) -> bool:
        if self._filling is None or not self._filling.done():
            return False
        # A failed load has ended too; the next step gets its error from `wait`.
        self._pending = self._filling.failed() is not None
        return True

    def evict(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            self._filling = None
        self._pending = True
        self._weights.unmap(0, self.weight_slabs)

    def host_bytes(self) -> int:
        return 0

    def drop_host(self) -> None:
        """Do nothing: a CPU has no host tier apart from the device."""

    def close(self) -> None:
        self.evict()
        self._weights.close()


class CpuModelMemory(CpuWeights):
    """Implements interfaces.ModelMemory and WeightReadiness."""

    def __init__(
        self, weights: VirtualRange, kv_range: KvRange, kv: KvGeometry, filler: Filler, slab_bytes: int
    ) -> None:
        super().__init__(weights, filler)
        self.kv = kv
        self.host_kv = CpuHostKv(kv_range.bytes_view, kv, slab_bytes)
        self._kv_range = kv_range

    @property
    def kv_view(self) -> Tensor:
        return self._kv_range.bytes_view

    def map_kv(self, index: int, slab: int) -> None:
        self._kv_range.map(index, slab)

    def unmap_kv(self, index: int) -> None:
        self._kv_range.unmap(index)

    def close(self) -> None:
        super().close()
        self.host_kv.close()
        self._kv_range.close()
