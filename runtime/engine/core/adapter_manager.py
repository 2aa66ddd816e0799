"""Decides which adapters are on the device, and where in their base's range.

An adapter comes when a sequence waits for it, and leaves, least recently used first, when its slot or its memory is wanted. It stays while sequences
use it; if all slots of a base are in use for longer than a waiting sequence's patience, the adapter that has been there longest is drained.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from runtime.engine.adapters.extents import ExtentMap
from runtime.engine.core.loaded_adapter import LoadedAdapter
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.interfaces import AdapterBank
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.operations import EvictAdapter, MapAdapters, Operation, SwapInAdapter, UnmapAdapters
from runtime.engine.scheduler.sequence import Sequence
from runtime.errors import RepertoryError

_PATIENCE_S = 2.0  # of a sequence whose adapter finds all slots in use


class SlabReclaimer(Protocol):
    """Frees slabs that other uses of the device hold."""

    def free_slabs(self, count: int, base: LoadedModel, order: tuple[int, int] | None, now: float) -> None:
        """Reclaim memory until `count` slabs are free, as far as possible. `order`: sequences after it may be preempted; None = none may."""

    def keeps_room(self, order: tuple[int, int]) -> bool:
        """Whether free memory is kept for a sequence that comes before `order`."""


class _Space:
    """One base's range and slots."""

    def __init__(self, base: LoadedModel, bank: AdapterBank, slab_bytes: int) -> None:
        self.base = base
        self.extents = ExtentMap(slab_bytes, bank.num_slabs)
        self.free_slots = list(range(bank.num_slots - 1, -1, -1))


class AdapterManager:
    """All loaded adapters, by id. `enqueue` takes an operation for the executor."""

    def __init__(self, pool: SlabPool, slab_bytes: int, enqueue: Callable[[Operation], None]) -> None:
        self._pool = pool
        self._slab_bytes = slab_bytes
        self._enqueue = enqueue
        self._spaces: dict[str, _Space] = {}
        self._swapping: dict[str, LoadedAdapter] = {}
        self.adapters: dict[str, LoadedAdapter] = {}
        self.num_changes = 0  # grows whenever an adapter arrives on the device, begins to, or leaves it

    def of(self, base: LoadedModel) -> list[LoadedAdapter]:
        return [adapter for adapter in self.adapters.values() if adapter.base is base]

    def slabs_of(self, size_bytes: int) -> int:
        """Return the slabs that an adapter of this size takes in an empty range."""
        return -(-size_bytes // self._slab_bytes)

    def add(self, adapter: LoadedAdapter, bank: AdapterBank) -> None:
        self.adapters[adapter.model_id] = adapter
        if adapter.base.model_id not in self._spaces:
            self._spaces[adapter.base.model_id] = _Space(adapter.base, bank, self._slab_bytes)

    def remove(self, adapter: LoadedAdapter) -> None:
        """Forget an adapter that has no sequences, and release its place."""
        if adapter.resident:
            self.evict(adapter)
        del self.adapters[adapter.model_id]

    def forget_base(self, base: LoadedModel) -> None:
        """Forget a base whose adapters were removed."""
        self._spaces.pop(base.model_id, None)

    def update(self, reclaimer: SlabReclaimer, now: float) -> list[tuple[LoadedAdapter, RepertoryError]]:
        """Note which copies have ended, and start those of adapters that sequences wait for. Returns the adapters whose copies failed."""
        failed: list[tuple[LoadedAdapter, RepertoryError]] = []
        for adapter in list(self._swapping.values()):
            try:
                if adapter.memory.swap_in_done():
                    del self._swapping[adapter.model_id]
                    adapter.finish_swap_in(now)
                    self.num_changes += 1
            except RepertoryError as error:
                failed.append((adapter, error))
        for space in self._spaces.values():
            for sequence, use in space.base.scheduler.waiting.blocked():
                adapter = self.adapters[use.adapter_id]
                if adapter.draining:
                    adapter.stop_draining(now)  # those for which it was to leave have their places, or are gone
                elif not adapter.resident and not self._bring_in(adapter, reclaimer, sequence, now):
                    break  # an adapter behind it must not take what it waits for
        return failed

    def load_if_free(self, adapter: LoadedAdapter, now: float) -> None:
        """Bring in an adapter that was just loaded if nothing has to leave for it."""
        space = self._spaces[adapter.base.model_id]
        placement = space.extents.find(adapter.size_bytes)
        if space.free_slots and placement is not None and len(placement.missing) < self._pool.free:
            self._place(adapter, now)

    @property
    def idle_slabs(self) -> int:
        """Slabs that evicting every adapter without sequences would free."""
        busy: dict[str, set[int]] = {base_id: set() for base_id in self._spaces}
        for adapter in self.adapters.values():
            if adapter.offset is not None and not adapter.evictable:
                busy[adapter.base.model_id] |= set(self._places(adapter.offset, adapter.size_bytes))
        return sum(space.extents.num_slabs - len(busy[base_id]) for base_id, space in self._spaces.items())

    def evict_oldest(self) -> bool:
        """Evict the adapter without sequences that was used least recently. Returns whether there was one."""
        return self._evict_oldest_of(self.adapters.values())

    def evict_after(self, order: tuple[int, int]) -> bool:
        """Evict an adapter all of whose sequences wait and come after `order`. Returns whether there was one."""
        for adapter in self.adapters.values():
            if adapter.resident and not adapter.swapping and not adapter.use.running:
                first = min(
                    (s.order for s in adapter.base.scheduler.sequences() if s.adapter is adapter.use), default=None
                )
                if first is None or first > order:
                    self.evict(adapter)
                    return True
        return False

    def evict(self, adapter: LoadedAdapter) -> None:
        """Take an adapter off the device. None of its sequences may have a row."""
        base_id = adapter.base.model_id
        space = self._spaces[base_id]
        self._enqueue(EvictAdapter(adapter.model_id))
        self._swapping.pop(adapter.model_id, None)
        slot, offset = adapter.leave_device()
        space.free_slots.append(slot)
        freed = space.extents.release(offset, adapter.size_bytes)
        for place in freed:
            self._enqueue(UnmapAdapters(base_id, place))
        self._pool.release(_owner(base_id), list(freed.values()))
        self.num_changes += 1

    def _bring_in(self, adapter: LoadedAdapter, reclaimer: SlabReclaimer, sequence: Sequence, now: float) -> bool:
        """Place an adapter that `sequence` waits for, if need be by evicting others. Returns whether it was placed."""
        base = adapter.base
        space = self._spaces[base.model_id]
        if not space.free_slots and not self._evict_oldest_of(self.of(base)):
            self._drain_one(base, now - sequence.arrived_s, now)
            return False
        placement = space.extents.find(adapter.size_bytes)
        need = self.slabs_of(adapter.size_bytes) + 1 if placement is None else len(placement.missing)
        if need and reclaimer.keeps_room(sequence.order):
            return False
        if need > self._pool.free:
            reclaimer.free_slabs(need, base, sequence.order, now)
        return self._place(adapter, now)

    def _place(self, adapter: LoadedAdapter, now: float) -> bool:
        base_id = adapter.base.model_id
        space = self._spaces[base_id]
        placement = space.extents.find(adapter.size_bytes)
        if placement is None or not space.free_slots:
            return False
        slabs = self._pool.lend(_owner(base_id), len(placement.missing))
        if slabs is None:
            return False
        space.extents.take(placement, adapter.size_bytes, slabs)
        for place, slab in zip(placement.missing, slabs, strict=True):
            self._enqueue(MapAdapters(base_id, place, slab))
        slot = space.free_slots.pop()
        self._enqueue(SwapInAdapter(adapter.model_id, slot, placement.offset))
        adapter.begin_swap_in(slot, placement.offset, now)
        self._swapping[adapter.model_id] = adapter
        self.num_changes += 1
        return True

    def _evict_oldest_of(self, adapters: Iterable[LoadedAdapter]) -> bool:
        oldest = min((a for a in adapters if a.evictable), key=lambda a: a.last_used_s, default=None)
        if oldest is None:
            return False
        self.evict(oldest)
        return True

    def _drain_one(self, base: LoadedModel, waited_s: float, now: float) -> None:
        resident = [adapter for adapter in self.of(base) if adapter.resident]
        if waited_s < _PATIENCE_S or any(adapter.draining or adapter.swapping for adapter in resident):
            return
        longest = min(resident, key=lambda adapter: adapter.ready_since_s)
        if now - longest.ready_since_s >= _PATIENCE_S:
            longest.drain()

    def _places(self, offset: int, size_bytes: int) -> range:
        return range(offset // self._slab_bytes, -(-(offset + size_bytes) // self._slab_bytes))

    def check(self) -> None:
        """Raise AssertionError unless the slabs and slots of every base add up."""
        if self._swapping.keys() != {adapter.model_id for adapter in self.adapters.values() if adapter.swapping}:
            raise AssertionError(f"{sorted(self._swapping)} are polled, but other adapters are being copied")
        for base_id, space in self._spaces.items():
            if self._pool.lent(_owner(base_id)) != space.extents.num_slabs:
                raise AssertionError(f"{base_id}: adapters hold {self._pool.lent(_owner(base_id))} slabs")
            slots = [a.use.slot for a in self.adapters.values() if a.base.model_id == base_id and a.resident]
            if len({*slots, *space.free_slots}) != len(slots) + len(space.free_slots):
                raise AssertionError(f"{base_id}: a slot of adapters is taken twice")


def _owner(base_id: str) -> str:
    return f"{base_id}/adapters"
