"""Copies of KV blocks on a CPU, in ordinary memory. Copying takes place at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.kv_runs import plane_layout, runs_of


class CpuHostKv:
    """Implements interfaces.HostKvMemory. `kv_view`: the model's KV range."""

    def __init__(self, kv_view: Tensor, kv: KvGeometry, slab_bytes: int) -> None:
        self._kv_view = kv_view
        self._kv = kv
        self._slab_bytes = slab_bytes
        self._layout = plane_layout(kv, slab_bytes)
        self._chunks: dict[int, Tensor] = {}

    def map(self, index: int) -> None:
        self._chunks[index] = torch.empty(self._slab_bytes, dtype=torch.uint8)

    def unmap(self, index: int) -> None:
        del self._chunks[index]

    def save(self, blocks: Sequence[tuple[int, int]]) -> None:
        for run in runs_of(blocks, self._kv):
            source = self._blocks(self._slab(run.slab), run.first, run.count)
            self._blocks(self._chunks[run.chunk], run.host_first, run.count).copy_(source)

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None:
        for run in runs_of(blocks, self._kv):
            source = self._blocks(self._chunks[run.chunk], run.host_first, run.count)
            self._blocks(self._slab(run.slab), run.first, run.count).copy_(source)

    def close(self) -> None:
        self._chunks.clear()
        self._kv_view = torch.empty(0, dtype=torch.uint8)

    def _slab(self, place: int) -> Tensor:
        return self._kv_view[place * self._slab_bytes : (place + 1) * self._slab_bytes]

    def _blocks(self, memory: Tensor, first: int, count: int) -> Tensor:
        """Return the bytes of adjacent blocks [planes, count * block_bytes] in a slab or chunk."""
        layout = self._layout
        planes = memory[: layout.num_planes * layout.plane_bytes].view(layout.num_planes, layout.plane_bytes)
        return planes[:, first * layout.block_bytes : (first + count) * layout.block_bytes]
