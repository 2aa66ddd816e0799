"""Keeps KV blocks of all models in host memory, within one budget.

The budget is a limit and reserves nothing: chunks are taken from host memory that no weights use, and `drop_oldest` releases them when weights
need it. The least recently read blocks over all models are dropped first.
"""

import dataclasses
from collections.abc import Callable

from runtime.engine.core.executor import HostKvOperations
from runtime.engine.interfaces import KvGeometry
from runtime.engine.kvcache.blocks import BlockPool
from runtime.engine.kvcache.host_blocks import HostBlocks
from runtime.engine.kvcache.prefix import PrefixCache
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import Operation


class ChunkPool(SlabPool):
    """Chunks of host memory, which are lent only while `has_room` says that one is free."""

    def __init__(self, total: int, has_room: Callable[[], bool]) -> None:
        super().__init__(total)
        self._has_room = has_room

    @property
    def free(self) -> int:
        unlent = super().free
        return unlent if unlent and self._has_room() else 0

    def lend(self, owner: str, count: int) -> list[int] | None:
        return super().lend(owner, count) if self._has_room() else None


class HostKv:
    """The saved blocks of every model, by id.

    Args:
        total_chunks: the budget, in chunks of a slab's size; 0 = nothing is saved.
        has_room: whether host memory has a free chunk that no weights are about to take.
        enqueue: takes an operation for the executor.
    """

    def __init__(self, total_chunks: int, has_room: Callable[[], bool], enqueue: Callable[[Operation], None]) -> None:
        self._pool = ChunkPool(total_chunks, has_room)
        self._enqueue = enqueue
        self._models: dict[str, HostBlocks] = {}

    def open(self, model_id: str, geometry: KvGeometry) -> HostBlocks | None:
        """Begin to keep the blocks of a model. Returns None if nothing is saved."""
        if not self._pool.total:
            return None
        copies = HostKvOperations(model_id, self._enqueue)
        chunks = dataclasses.replace(geometry, max_slabs=self._pool.total)
        blocks = HostBlocks(PrefixCache(BlockPool(chunks, self._pool, model_id, copies)), copies, self._make_room)
        self._models[model_id] = blocks
        return blocks

    def forget(self, model_id: str) -> None:
        """Drop the blocks of a model, because a failed step may have left their content undefined."""
        if model_id in self._models:
            self._models[model_id].cache.forget()

    def close(self, model_id: str) -> None:
        """Drop the blocks of a model that is unloaded, and keep no more."""
        self.forget(model_id)
        self._models.pop(model_id, None)

    @property
    def num_chunks(self) -> int:
        """The chunks that hold blocks."""
        return sum(blocks.cache.blocks.slabs for blocks in self._models.values())

    def drop_oldest(self) -> bool:
        """Release the chunk whose blocks were read least recently over all models. Returns False if there is none."""
        oldest = self._oldest()
        return oldest is not None and oldest[1].drop_oldest_slab()

    def _make_room(self, cache: PrefixCache, read_s: float) -> bool:
        """Let `cache` allocate a block for content that was last read at `read_s`: a free one, else the memory of the block that was read least recently.

        That block may be the cache's own, which `take` reuses, or in another model's chunk, which is dropped. Returns False if it was read after `read_s`.
        """
        if cache.blocks.free_blocks or cache.blocks.obtainable():
            return True
        oldest = self._oldest()
        if oldest is None or oldest[0] > read_s:
            return False
        return oldest[1] is cache or oldest[1].drop_oldest_slab()

    def _oldest(self) -> tuple[float, PrefixCache] | None:
        """Return when the least recently read block of all models was read, and its model's index."""
        held = [(blocks.cache.oldest_idle_s, blocks.cache) for blocks in self._models.values()]
        return min(
            ((read_s, cache) for read_s, cache in held if read_s is not None), key=lambda entry: entry[0], default=None
        )

    def check(self) -> None:
        """Raise AssertionError unless every chunk is free or holds blocks of one model, none of them in use."""
        SlabPool.check(self._pool)
        for model_id, blocks in self._models.items():
            blocks.cache.check()
            if blocks.cache.blocks.used_blocks:
                raise AssertionError(f"{model_id}: {blocks.cache.blocks.used_blocks} saved blocks are in use")
