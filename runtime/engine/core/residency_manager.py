"""Decides which models' weights are on the device and finds room for KV cache under pressure.

Memory is reclaimed in this order: cached prefixes (least recently used over all models), idle adapters, the weights of idle models, then the newest
rows of the model that exceeds its share most. The choices themselves are pure functions in memory/residency.py.
"""

from collections.abc import Callable, Iterable, Mapping

from common.model_state import Tier
from runtime.engine.core.adapter_manager import AdapterManager
from runtime.engine.core.device_share import DeviceShare
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.memory.residency import Holder, choose_to_drain, choose_victims, patience_s
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import Evict, Operation, SwapIn
from runtime.engine.scheduler.admission import blocks_for
from runtime.engine.scheduler.limits import KvRoom
from runtime.engine.scheduler.prefix_blocks import reusable_hashes
from runtime.engine.scheduler.sequence import Sequence

_LONGEST_PASSED_OVER_S = 10.0  # Models that came later, and need less, are swapped in before one for so long.
_LONGEST_DRAIN_S = 10.0  # then the rows of a draining model are preempted


class ResidencyManager:
    """Decides residency and enqueues the operations that bring it about.

    Args:
        models: the loaded models by id, a view of the model table.
        enqueue: takes an operation for the executor.
        adapters: the adapters of all models.
        share: what other engines of the devices have or want.
        make_host_room: makes room in the host tier for a model that returns from disk.
    """

    def __init__(
        self,
        pool: SlabPool,
        models: Mapping[str, LoadedModel],
        enqueue: Callable[[Operation], None],
        adapters: AdapterManager,
        share: DeviceShare,
        make_host_room: Callable[[LoadedModel], None] = lambda model: None,
    ) -> None:
        self._make_host_room = make_host_room
        self._pool = pool
        self._adapters = adapters
        self._share = share
        self._models = models
        self._enqueue = enqueue
        self._claimant = ""  # the model whose first sequence waits for room that others are releasing
        self._drained_for = ""  # the model for which others were last drained
        self._num_changes = 0

    @property
    def num_changes(self) -> int:
        """Grows whenever weights arrive on the device, begin to, or leave it."""
        return self._num_changes

    # Weights --------------------------------------------------------------------------------------------------------------------------------

    def update(self, now: float) -> None:
        """Note finished swap-ins, end drains that take too long, and swap in models with waiting requests, longest wait first."""
        absent: list[tuple[float, LoadedModel]] = []
        for model in self._models.values():
            if model.swapping and model.memory.swap_in_done():
                model.finish_swap_in(now)
                self._num_changes += 1
            if not model.resident:
                since = model.scheduler.waiting.oldest_s()
                if since is not None:
                    absent.append((since, model))
            elif model.draining_since_s is not None and now - model.draining_since_s > _LONGEST_DRAIN_S:
                while model.scheduler.preempt_newest(now):
                    pass
        if not absent:
            if not self._has_turn(now) and not self._share.drains:
                self._end_drains()
            return
        absent.sort(key=lambda entry: entry[0])
        for since, model in absent:
            self._bring_in(model, now - since, now)
            if not model.resident and now - since > _LONGEST_PASSED_OVER_S:
                return  # or those that came later would take what it needs, one after the other

    def load_if_free(self, model: LoadedModel, now: float) -> bool:
        """Swap in a model that was just loaded if no other model has to be evicted for it. Returns whether it was."""
        if self._pool.free >= model.memory.weight_slabs + 1 and not self._room_is_kept():
            self._swap_in(model, now)
        return model.resident

    def release_claim(self, model: LoadedModel) -> None:
        """End the model's claim, since a step was planned and it has the room that it waited for."""
        if self._claimant == model.model_id:
            self._claimant = ""

    def evict(self, model: LoadedModel) -> None:
        """Evict the weights of a resident model; cached prefixes stay until their room is wanted."""
        if not model.resident:
            return
        self._enqueue(Evict(model.model_id))
        self._pool.release(model.weights_owner, model.leave_device())
        self.release_claim(model)
        model.scheduler.promise(0)
        self._num_changes += 1

    def _bring_in(self, model: LoadedModel, waited_s: float, now: float) -> None:
        need = self._slabs_to_begin(model)
        short = need - self._pool.free
        if self._share.surplus:
            # What is to be given back must not be taken.
            self._share.need(max(short, 1), now - waited_s)
            return
        if self._room_is_kept(model):
            return
        if short > 0:
            head = model.scheduler.waiting.head()
            if model.host_blocks is not None and head is not None:
                # What leaves the device for this request must not push its own blocks out of host memory.
                model.host_blocks.touch(reusable_hashes(model.cache, head), now)
            others = [m for m in self._models.values() if m.resident and m is not model]
            short -= sum(m.cache.blocks.idle_slabs for m in self._models.values()) + self._adapters.idle_slabs
            holders = [m.holder() for m in others]
            if short > 0 and self._share.can_grow:
                # Which idle model leaves is decided over all engines of the devices.
                self._share.need(short, now - waited_s)
                victims = choose_victims([h for h in holders if h.draining], short)
            else:
                victims = choose_victims(holders, max(short, 0))
            if victims is None:
                # running rows' KV goes with the rows, so a model that drains frees more than its weights
                kv = sum(m.cache.blocks.slabs - m.cache.blocks.idle_slabs for m in others)
                for victim in choose_to_drain(holders, max(short - kv, 1), waited_s, model.return_cost_s, now):
                    self._models[victim].drain(now)
                    self._drained_for = model.model_id
                return
            while self._pool.free < need and self._drop_oldest_prefix(self._models.values()):
                pass
            while self._pool.free < need and self._adapters.evict_oldest():
                pass
            for victim in victims:
                if self._pool.free < need:
                    self.evict(self._models[victim])
        if self._pool.free >= need:
            self._swap_in(model, now)

    def _slabs_to_begin(self, model: LoadedModel) -> int:
        """Weights, and KV for the first request in the queue, less the KV slabs that it holds."""
        head = model.scheduler.waiting.head()
        geometry = model.cache.blocks.geometry
        blocks = blocks_for(head.tokens_to_begin if head else 1, geometry.block_tokens)
        return model.memory.weight_slabs + max(
            blocks_for(blocks, geometry.blocks_per_slab) - model.cache.blocks.slabs, 0
        )

    def _swap_in(self, model: LoadedModel, now: float) -> None:
        slabs = self._pool.lend(model.weights_owner, model.memory.weight_slabs)
        if slabs is None:
            return
        if model.lower_tier is Tier.DISK:
            self._make_host_room(model)
        self._enqueue(SwapIn(model.model_id, tuple(slabs)))
        model.begin_swap_in(slabs, now)
        self._num_changes += 1

    def _has_turn(self, now: float) -> bool:
        """Whether the model for which others were drained has requests still, and came in less than its patience ago.

        The drained models' requests came before its own, and would take the room back before it has drawn a token.
        """
        model = self._models.get(self._drained_for)
        if model is None or not model.resident or not model.has_work():
            return False
        return now - model.resident_since_s < patience_s(model.return_cost_s, model.return_cost_s)

    def _end_drains(self) -> None:
        self._drained_for = ""
        for model in self._models.values():
            model.stop_draining()

    # KV -------------------------------------------------------------------------------------------------------------------------------------

    def kv_room(self, model: LoadedModel) -> KvRoom:
        """Return the blocks that the model could have, its own included."""
        others = [m for m in self._models.values() if m is not model]
        free = self._pool.free + self._adapters.idle_slabs
        planned = free + sum(_spare_slabs(m) for m in others)
        now = free + sum(_spare_slabs(m, with_expected=False) for m in others)
        return KvRoom(_kv_blocks(model, planned), _kv_blocks(model, now))

    def kv_blocks_of_all(self) -> dict[str, int]:
        """Return the planned `kv_room` of every model in one pass."""
        spare = {model_id: _spare_slabs(model) for model_id, model in self._models.items()}
        slabs = self._pool.free + self._adapters.idle_slabs + sum(spare.values())
        return {model_id: _kv_blocks(model, slabs - spare[model_id]) for model_id, model in self._models.items()}

    def make_room(self, model: LoadedModel, blocks: int, now: float) -> None:
        """Reclaim memory from other models until the model's cache can give out `blocks` more, as far as possible."""
        cache = model.cache
        others = [m for m in self._models.values() if m is not model]
        own_oldest = cache.oldest_idle_s
        while cache.blocks.obtainable() < blocks and self._drop_oldest_prefix(others, own_oldest):
            pass
        while cache.obtainable() < blocks and self._drop_oldest_prefix(others):
            pass
        while cache.obtainable() < blocks and self._adapters.evict_oldest():
            pass
        self._evict_for(model, blocks, [m.holder() for m in others if m.resident], now)
        if cache.obtainable() < blocks and self._share.can_grow:
            self._share.need(blocks_for(blocks - cache.obtainable(), cache.blocks.geometry.blocks_per_slab))
        while cache.obtainable() < blocks and self._preempt_above_share(model, others, now):
            pass
        # A model's only row would be preempted for a block that a later request of another model has.
        if model.scheduler.running == 1 and model.scheduler.lacks_block():
            foremost = model.scheduler.foremost()
            while not cache.obtainable() and any(m.scheduler.preempt_newest(now, foremost) for m in others):
                while self._drop_oldest_prefix(others):
                    pass

    def yield_to(self, model: LoadedModel, sequence: Sequence, now: float) -> None:
        """Reclaim room for `sequence`, the first of a model that cannot run anything, from every request that came after it, regardless of shares.

        The order of requests is the same for all models and never changes. So the first request of all always runs in the end, and two models cannot
        preempt each other in turns.
        """
        blocks = blocks_for(sequence.tokens_to_begin, model.cache.blocks.geometry.block_tokens) - len(
            sequence.block_ids
        )
        others = [m for m in self._models.values() if m is not model]
        if self._room_is_kept(model):
            return
        for other in others:
            other.scheduler.promise(0)
        while model.cache.obtainable() < blocks and self._drop_oldest_prefix(others):
            pass
        while model.cache.obtainable() < blocks and self._adapters.evict_oldest():
            pass
        self._evict_for(model, blocks, [m.holder(sequence.order) for m in others if m.resident], now)
        for other in others:
            while model.cache.obtainable() < blocks and other.scheduler.preempt_newest(now, sequence.order):
                while self._drop_oldest_prefix((other,)):
                    pass
        while model.cache.obtainable() < blocks and self._adapters.evict_after(sequence.order):
            pass
        self._evict_for(model, blocks, [m.holder(sequence.order) for m in others if m.resident], now)
        # Weights that are being copied cannot be evicted yet. They will be once they have arrived, so their room counts.
        arriving = sum(m.memory.weight_slabs for m in others if m.swapping and _comes_after(m, sequence))
        if model.cache.obtainable() + arriving * model.cache.blocks.geometry.blocks_per_slab < blocks:
            return
        self._claimant = model.model_id  # or the preempted sequences would take the room back
        model.scheduler.promise(blocks)

    def free_slabs(self, count: int, base: LoadedModel, order: tuple[int, int] | None, now: float) -> None:
        """Reclaim memory for an adapter of `base`. See adapter_manager.SlabReclaimer."""
        models = list(self._models.values())
        while self._pool.free < count and self._drop_oldest_prefix(models):
            pass
        while self._pool.free < count and self._adapters.evict_oldest():
            pass
        if self._pool.free < count:
            holders = [m.holder() for m in models if m.resident and m is not base]
            for victim in choose_victims(holders, count - self._pool.free) or ():
                self.evict(self._models[victim])
        if order is None:
            return
        for model in models:
            while self._pool.free < count and model.scheduler.preempt_newest(now, order):
                while self._drop_oldest_prefix((model,)):
                    pass

    def keeps_room(self, order: tuple[int, int]) -> bool:
        """Whether free memory is kept for a sequence that comes before `order`. See adapter_manager.SlabReclaimer."""
        for model in self._models.values():
            waits = model.model_id == self._claimant or (
                not model.scheduler.running and model.scheduler.promised_blocks
            )
            foremost = model.scheduler.foremost()
            if waits and foremost is not None and foremost < order:
                return True
        return False

    def _room_is_kept(self, model: LoadedModel | None = None) -> bool:
        """Whether room is kept for another model's request that comes before all requests of `model`."""
        order = model.scheduler.foremost() if model is not None else None
        for other in self._models.values():
            if other is model or (other.draining and not other.scheduler.running):
                continue
            if other.model_id != self._claimant and (other.scheduler.running or not other.scheduler.promised_blocks):
                continue
            foremost = other.scheduler.foremost()
            if foremost is not None and (order is None or foremost < order):
                return True
        return False

    def _evict_for(self, model: LoadedModel, blocks: int, holders: list[Holder], now: float) -> None:
        """Evict idle models until the model can have `blocks`; if that is impossible, evict what frees at least one slab."""
        short = blocks - model.cache.obtainable()
        if short <= 0:
            return
        slabs = blocks_for(short, model.cache.blocks.geometry.blocks_per_slab)
        victims = choose_victims(holders, slabs)
        if victims is None:
            victims = choose_victims(holders, 1)
        for victim in victims or ():
            self.evict(self._models[victim])

    def drop_oldest_prefix(self) -> bool:
        """Release the slab of cached prefixes that was least recently used. Returns whether there was one."""
        return self._drop_oldest_prefix(self._models.values())

    def _drop_oldest_prefix(self, models: Iterable[LoadedModel], older_than_s: float | None = None) -> bool:
        """Release the slab of cached prefixes that was least recently used over these models."""
        ages: list[tuple[float, LoadedModel]] = []
        for model in models:
            oldest_s = model.cache.oldest_idle_s
            if (
                oldest_s is not None
                and model.cache.blocks.idle_slabs
                and (older_than_s is None or oldest_s < older_than_s)
            ):
                ages.append((oldest_s, model))
        ages.sort(key=lambda entry: entry[0])
        return any(model.cache.drop_oldest_slab() for _, model in ages)

    def _preempt_above_share(self, model: LoadedModel, others: list[LoadedModel], now: float) -> bool:
        """Preempt the newest row of the model that holds most KV, if that is more than this model would hold.

        A row that came before all of this model's requests is not preempted, or two models would preempt each other endlessly.
        """
        running = [m for m in others if m.scheduler.running]
        furthest = max(running, key=_used_slabs, default=None)
        if furthest is None or _used_slabs(furthest) <= _used_slabs(model) + 1:
            return False
        if not furthest.scheduler.preempt_newest(now, model.scheduler.foremost()):
            return False
        while self._drop_oldest_prefix((furthest,)):
            pass
        return True


def _spare_slabs(model: LoadedModel, *, with_expected: bool = True) -> int:
    """Return the slabs that other models could take from this one; negative if it is promised more than it holds.

    `with_expected` False: what its running sequences may need later does not count, only a promise to a waiting one.
    """
    blocks = model.cache.blocks
    counts = with_expected or not model.scheduler.running
    promised = blocks_for(model.scheduler.promised_blocks, blocks.geometry.blocks_per_slab) if counts else 0
    slabs = blocks.idle_slabs - max(0, promised - (blocks.slabs - blocks.idle_slabs))
    return slabs + (model.memory.weight_slabs if model.resident and model.holder().evictable else 0)


def _kv_blocks(model: LoadedModel, others_slabs: int) -> int:
    own = model.cache.blocks
    return min(max(others_slabs, 0) + own.slabs, own.geometry.max_slabs) * own.geometry.blocks_per_slab


def _comes_after(model: LoadedModel, sequence: Sequence) -> bool:
    """Whether all requests of `model` come after `sequence`."""
    foremost = model.scheduler.foremost()
    return foremost is None or foremost > sequence.order


def _used_slabs(model: LoadedModel) -> float:
    """Return the KV cache of running rows, in slabs."""
    blocks = model.cache.blocks
    return blocks.used_blocks / blocks.geometry.blocks_per_slab
