"""The virtual range of a model's KV cache, to which slabs are mapped one by one."""

from torch import Tensor

from runtime.engine.memory.device import VirtualRange


class KvRange:
    """Addresses for `memory.num_slabs` slabs of KV."""

    def __init__(self, memory: VirtualRange) -> None:
        self._memory = memory
        self._mapped: set[int] = set()

    @property
    def bytes_view(self) -> Tensor:
        return self._memory.bytes_view

    @property
    def num_mapped(self) -> int:
        return len(self._mapped)

    def map(self, index: int, slab: int) -> None:
        self._memory.map(index, [slab])
        self._mapped.add(index)

    def unmap(self, index: int) -> None:
        self._mapped.remove(index)
        self._memory.unmap(index, 1)

    def close(self) -> None:
        self._mapped.clear()
        self._memory.close()
