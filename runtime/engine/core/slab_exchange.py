"""Gives slabs of shared devices back for other engines, and notes which slabs this engine lacks.

Only what nothing uses is given back: free slabs, cached prefixes, idle adapters and idle models. Busy models are drained where the front says so.
"""

import math
from collections.abc import Callable, Mapping

from runtime.engine.core.adapter_manager import AdapterManager
from runtime.engine.core.device_share import DeviceShare
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.residency_manager import ResidencyManager
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import DecommitSlabs, Operation
from runtime.engine.scheduler.admission import blocks_for
from runtime.ipc.messages import Resize

_LONGEST_WISH_S = 2.0  # a model that was just loaded waits so long for memory that costs no eviction


class SlabExchange:
    """Changes what `share` holds. `enqueue` takes an operation for the executor."""

    def __init__(
        self,
        share: DeviceShare,
        pool: SlabPool,
        models: Mapping[str, LoadedModel],
        resident: ResidencyManager,
        adapters: AdapterManager,
        enqueue: Callable[[Operation], None],
    ) -> None:
        self._share = share
        self._pool = pool
        self._models = models
        self._resident = resident
        self._adapters = adapters
        self._enqueue = enqueue
        self._wishes: dict[str, float] = {}  # models that were just loaded → until when slabs are wanted for them

    @property
    def free_slabs(self) -> int:
        """Free slabs that neither running rows nor the first requests of resident models are expected to need."""
        return max(0, self._pool.free - sum(map(_expected_slabs, self._models.values())))

    @property
    def idle_slabs(self) -> int:
        """Slabs of cached prefixes, and of adapters without sequences."""
        return sum(m.cache.blocks.idle_slabs for m in self._models.values()) + self._adapters.idle_slabs

    def update(self, now: float) -> None:
        """Begin a turn: give back what has become free, or note what is lacking. Call it before residency is decided."""
        self._share.begin_turn()
        if self._share.surplus:
            self._give_back(now)
            return
        if self._wishes:
            self._load_wished(now)
        if self._share.can_grow:
            self._note_lack()

    def load_if_free(self, model: LoadedModel, now: float) -> None:
        """Swap in a model that was just loaded if no other model has to be evicted for it, here or in another engine."""
        if not self._resident.load_if_free(model, now) and self._share.can_grow:
            self._wishes[model.model_id] = now + _LONGEST_WISH_S

    def resize(self, command: Resize, now: float) -> None:
        """Begin to hold another number of slabs. Evicts the models that the command names, if they are idle."""
        self._share.begin(command)
        for model_id in command.evict:
            model = self._models.get(model_id)
            if model is not None and model.resident and model.holder().evictable:
                self._resident.evict(model)
        if self._share.surplus:
            self._give_back(now)
        if not command.drain:
            self._share.settle_for(max(command.num_slabs, self._pool.committed))

    def _give_back(self, now: float) -> None:
        surplus = self._share.surplus
        for model in self._models.values():
            if self.free_slabs < surplus and model.resident and model.draining and model.holder().evictable:
                self._resident.evict(model)
        while self.free_slabs < surplus and self._resident.drop_oldest_prefix():
            pass
        while self.free_slabs < surplus and self._adapters.evict_oldest():
            pass
        slabs = self._pool.decommit(min(surplus, self.free_slabs))
        if slabs:
            self._enqueue(DecommitSlabs(tuple(slabs)))
        if self._share.drains:
            self._drain(now)

    def _drain(self, now: float) -> None:
        """Drain models, the one that has been resident longest first, until those that drain hold what is still to be given back."""
        held = {m.model_id: m.cache.blocks.slabs + len(m.weight_slabs or ()) for m in self._models.values()}
        resident = [m for m in self._models.values() if m.resident]
        missing = self._share.surplus - sum(held[m.model_id] for m in resident if m.draining)
        for model in sorted(resident, key=lambda m: m.resident_since_s):
            if missing <= 0:
                return
            if not model.draining:
                model.drain(now)
                missing -= held[model.model_id]

    def _load_wished(self, now: float) -> None:
        for model_id, until_s in list(self._wishes.items()):
            model = self._models.get(model_id)
            if model is None or model.resident or now > until_s or self._resident.load_if_free(model, now):
                del self._wishes[model_id]
            else:
                self._share.want(model.memory.weight_slabs + 1 - self._pool.free)

    def _note_lack(self) -> None:
        for model in self._models.values():
            if model.resident and model.has_work():
                if self._pool.free < self._share.spare_slabs:
                    self._share.want(self._share.spare_slabs)
                self._note_lack_of_head(model)

    def _note_lack_of_head(self, model: LoadedModel) -> None:
        """Note the KV that the first waiting request of a resident model lacks."""
        head = model.scheduler.waiting.head()
        if head is None or model.draining:
            return
        blocks = model.cache.blocks
        wanted = blocks_for(head.tokens_to_begin, blocks.geometry.block_tokens) - len(head.block_ids)
        short = wanted - (self._resident.kv_room(model).now - blocks.used_blocks)
        if short > 0:
            since_s = math.inf if model.scheduler.running else head.arrived_s
            self._share.need(blocks_for(short, blocks.geometry.blocks_per_slab), since_s)


def _expected_slabs(model: LoadedModel) -> int:
    """Return the slabs that a resident model is expected to need beyond those that it uses: for its running rows, or for its first request."""
    if not model.resident:
        return 0
    blocks, head = model.cache.blocks, model.scheduler.waiting.head()
    if model.scheduler.running:
        expected = model.scheduler.promised_blocks
    else:
        expected = 0 if head is None else blocks_for(head.tokens_to_begin, blocks.geometry.block_tokens)
    return max(0, blocks_for(expected, blocks.geometry.blocks_per_slab) - blocks.slabs + blocks.idle_slabs)
