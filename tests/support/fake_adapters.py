"""Adapters of the fake backend: their bank, their memory and their loads."""

from typing import TYPE_CHECKING

import msgspec

from runtime.engine.interfaces import (
    AdapterResult,
    LoadResult,
)
from runtime.errors import LoadFailed
from tests.support.fake_specs import FakeAdapterSpec

if TYPE_CHECKING:
    from tests.support.fake_backend import FakeBackend


class FakeBank:
    """Implements interfaces.AdapterBank: what lies at which byte of the range, and which slot names it."""

    def __init__(self, backend: "FakeBackend", model_id: str) -> None:
        self.num_slabs = backend.total_slabs
        self.num_slots = backend.adapter_slots
        self._backend = backend
        self._model_id = model_id
        self.slab_at: dict[int, int] = {}
        self.slots: dict[int, FakeAdapterMemory] = {}
        self.closed = False

    def map(self, index: int, slab: int) -> None:
        assert index not in self.slab_at
        self._backend.map(slab, (self._model_id, "adapters"))
        self.slab_at[index] = slab

    def unmap(self, index: int) -> None:
        self._backend.unmap(self.slab_at.pop(index), (self._model_id, "adapters"))

    def close(self) -> None:
        assert not self.slab_at
        self.closed = True

    def content(self, slot: int) -> str:
        """What a step finds in `slot`."""
        found = self.slots.get(slot)
        assert found is not None, f"slot {slot} names an adapter that has left"
        assert found.arrived, f"slot {slot} names an adapter that has not arrived"
        assert all(place in self.slab_at for place in found.places()), "its slabs are not mapped"
        return found.spec.content


class FakeAdapterMemory:
    """Implements interfaces.AdapterMemory."""

    def __init__(self, backend: "FakeBackend", bank: FakeBank, spec: FakeAdapterSpec) -> None:
        self.spec = spec
        self.size_bytes = spec.size_bytes
        self.digest = spec.content
        self._slab_bytes = backend.slab_bytes
        self._bank = bank
        self._offset = 0
        self._polls = 0
        self.resident = self.arrived = self.closed = False

    def places(self) -> range:
        return range(self._offset // self._slab_bytes, -(-(self._offset + self.size_bytes) // self._slab_bytes))

    def swap_in(self, slot: int, offset: int) -> None:
        assert not self.resident
        self._offset, self._polls = offset, 0
        assert all(place in self._bank.slab_at for place in self.places()), "its slabs are not mapped"
        for other in self._bank.slots.values():
            end = other._offset + other.size_bytes
            assert not other.resident or end <= offset or other._offset >= offset + self.size_bytes, "two at one place"
        assert slot not in self._bank.slots, f"slot {slot} is taken"
        self._bank.slots[slot] = self
        self.resident, self.arrived = True, False

    def swap_in_done(self) -> bool:
        self._polls += 1
        if self.spec.swap_fails:
            raise LoadFailed("the packed file is gone")
        self.arrived = self._polls > self.spec.swap_polls
        return self.arrived

    def wait(self) -> None:
        if self.spec.swap_fails:
            raise LoadFailed("the packed file is gone")
        self.arrived = True

    def evict(self) -> None:
        self.resident = False
        self._bank.slots = {slot: named for slot, named in self._bank.slots.items() if named is not self}

    def host_bytes(self) -> int:
        return 0

    def drop_host(self) -> None:
        raise AssertionError("there is no host arena")

    def close(self) -> None:
        assert not self.resident
        self.closed = True


class FakeAdapterJob:
    def __init__(self, backend: "FakeBackend", model_id: str, base: LoadResult) -> None:
        self._backend, self._model_id, self._base = backend, model_id, base
        self._spec = backend.adapters[model_id]
        self._polls = self._spec.load_polls

    def done(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def result(self) -> AdapterResult:
        if self._spec.fails:
            raise LoadFailed(f"model {self._model_id}: {self._spec.fails}")
        bank = self._base.adapters
        assert isinstance(bank, FakeBank)
        memory = FakeAdapterMemory(self._backend, bank, self._spec)
        self._backend.adapter_memories.append(memory)
        facts = msgspec.structs.replace(
            self._base.runner.facts, model_id=self._model_id, weight_bytes=self._spec.size_bytes
        )
        return AdapterResult(facts, memory)

    def cancel(self) -> None: ...
