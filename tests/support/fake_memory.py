"""Weights and KV cache of the fake backend, on the device and in host memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.support.fake_specs import FakeSpec

if TYPE_CHECKING:
    from tests.support.fake_backend import FakeBackend


class FakeMemory:
    def __init__(self, backend: "FakeBackend", model_id: str, spec: FakeSpec) -> None:
        self.weight_slabs = spec.weight_slabs
        self.weight_bytes = spec.weight_slabs * backend.slab_bytes
        self.kv = spec.kv
        self._backend = backend
        self._model_id = model_id
        self._spec = spec
        self._polls = 0
        self.resident = False
        self.closed = False
        self.kv_slab: dict[int, int] = {}
        self.cells: dict[tuple[int, int], tuple[int, int, str]] = {}  # (page, offset) → (position, token, adapter)
        self.host_kv = FakeHostKv(backend, self)
        if backend.host_free_bytes() >= self.weight_bytes:
            backend.host_weights[id(self)] = self.weight_bytes

    def swap_in(self, slabs: Sequence[int]) -> None:
        try:
            self._swap_in(slabs)
        except AssertionError as error:
            self._backend.broken_rules.append(f"{self._model_id}: swapped in wrongly: {error}")
            raise

    def _swap_in(self, slabs: Sequence[int]) -> None:
        assert not self.resident
        assert len(slabs) == self.weight_slabs
        assert not self.closed
        if self._backend.broken_swap_ins.pop(self._model_id, None):
            raise OSError("no such file")
        for slab in slabs:
            self._backend.map(slab, (self._model_id, "weights"))
        self._slabs = list(slabs)
        self.resident = True
        self._polls = 0

    def swap_in_done(self) -> bool:
        self._polls += 1
        return self._polls > self._spec.swap_polls

    def evict(self) -> None:
        if self.resident:
            for slab in self._slabs:
                self._backend.unmap(slab, (self._model_id, "weights"))
        self.resident = False

    def map_kv(self, index: int, slab: int) -> None:
        assert 0 <= index < self.kv.max_slabs
        assert index not in self.kv_slab
        self._backend.map(slab, (self._model_id, "kv"))
        self.kv_slab[index] = slab

    def unmap_kv(self, index: int) -> None:
        self._backend.unmap(self.kv_slab.pop(index), (self._model_id, "kv"))
        self.cells = {cell: value for cell, value in self.cells.items() if cell[0] // self.kv.pages_per_slab != index}

    def host_bytes(self) -> int:
        return self._backend.host_weights.get(id(self), 0)

    def drop_host(self) -> None:
        del self._backend.host_weights[id(self)]

    def close(self) -> None:
        self._backend.host_weights.pop(id(self), None)
        assert not self.resident
        assert not self.kv_slab
        assert not self.host_kv.chunks
        assert not self.closed
        self.closed = True


class FakeHostKv:
    """Implements interfaces.HostKvMemory: the cells of blocks that were saved, until their chunk goes."""

    def __init__(self, backend: "FakeBackend", memory: FakeMemory) -> None:
        self._backend = backend
        self._memory = memory
        self.chunks: set[int] = set()
        self.cells: dict[tuple[int, int], tuple[int, int, str]] = {}  # (host page, offset) → as in a page
        self.saved = 0
        self.restored = 0

    def map(self, index: int) -> None:
        assert index not in self.chunks
        assert self._backend.host_kv_used + self._backend.slab_bytes <= self._backend.host_kv_bytes
        self._backend.host_kv_used += self._backend.slab_bytes
        self.chunks.add(index)

    def unmap(self, index: int) -> None:
        self.chunks.remove(index)
        self._backend.host_kv_used -= self._backend.slab_bytes
        per_chunk = self._memory.kv.pages_per_slab
        self.cells = {cell: value for cell, value in self.cells.items() if cell[0] // per_chunk != index}

    def save(self, blocks: Sequence[tuple[int, int]]) -> None:
        for page, host_page in blocks:
            self._check(page, host_page)
            for offset in range(self._memory.kv.block_tokens):
                self.cells[host_page, offset] = self._memory.cells[page, offset]
        self.saved += len(blocks)

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None:
        for page, host_page in blocks:
            self._check(page, host_page)
            for offset in range(self._memory.kv.block_tokens):
                self._memory.cells[page, offset] = self.cells[host_page, offset]
        self.restored += len(blocks)

    def _check(self, page: int, host_page: int) -> None:
        assert page // self._memory.kv.pages_per_slab in self._memory.kv_slab, f"page {page} is not mapped"
        assert host_page // self._memory.kv.pages_per_slab in self.chunks, f"host page {host_page} has no chunk"
