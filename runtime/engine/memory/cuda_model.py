"""One loaded model's memory on a GPU: its weights, and the range of its KV cache."""

import torch
from torch import Tensor

from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.cuda import CudaMemory, CudaRange
from runtime.engine.memory.cuda_host_kv import CudaHostKv
from runtime.engine.memory.cuda_weights import CudaWeights
from runtime.engine.memory.device import VirtualRange
from runtime.engine.memory.host_tier import HostTier
from runtime.engine.memory.kv_range import KvRange
from runtime.engine.memory.weight_buffer import Filler


class CudaModelMemory(CudaWeights):
    """Implements interfaces.ModelMemory and WeightReadiness. Use it from the engine thread, except `stage`."""

    def __init__(
        self,
        memory: CudaMemory,
        copy_stream: torch.cuda.Stream,
        kv_stream: torch.cuda.Stream,
        arena: HostTier,
        weights: VirtualRange,
        kv_range: CudaRange,
        kv: KvGeometry,
        filler: Filler,
        identity: str,
    ) -> None:
        super().__init__(memory, copy_stream, arena, weights, filler, identity)
        self.kv = kv
        self.host_kv = CudaHostKv(memory, kv_stream, arena, kv_range, kv)
        self._kv_range = KvRange(kv_range)

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
