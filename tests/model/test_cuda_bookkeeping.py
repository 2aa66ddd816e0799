"""The GPU side's bookkeeping without a GPU: a driver that checks every call, events that pass when told. What the calls do is test_cuda_memory's."""

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.engine.memory import cuda
from runtime.engine.memory.arena_index import ArenaIndex
from runtime.engine.memory.cuda import CudaMemory, CudaRange
from runtime.engine.memory.cuda_model import CudaModelMemory
from runtime.engine.memory.host import HostArena
from runtime.engine.memory.kv_range import KvRange
from runtime.engine.model.build import assemble, draw
from runtime.engine.model.fuse_proof import Prover
from runtime.engine.model.geometry import kv_geometry
from tests.model.test_build import assert_same, tiny
from tests.support.families import VOCAB
from tests.support.steps import Resident, hf_logits, prompts, save

SLAB = 64 * 1024


class CheckedDriver:
    """Reserved addresses are ordinary memory; a slab's contents do not follow it, which no test here needs."""

    def __init__(self, ordinal: int) -> None:
        self.memory: dict[int, torch.Tensor] = {}
        self.mapped: dict[int, int] = {}
        self.accessible: set[int] = set()
        self.unmap_calls = 0

    def granularity(self) -> int:
        return 4096

    def create(self, size: int) -> object:
        return object()

    def release(self, handle: object) -> None:
        assert not self.mapped

    def reserve(self, size: int) -> int:
        made = torch.zeros(size, dtype=torch.uint8)
        self.memory[made.data_ptr()] = made
        return made.data_ptr()

    def free(self, address: int, size: int) -> None:
        assert not any(address <= at < address + size for at in self.mapped)
        assert self.memory.pop(address).numel() == size

    def map(self, address: int, size: int, handle: object) -> None:
        assert all(not at < address + size or not address < at + length for at, length in self.mapped.items()), "mapped twice"
        self.mapped[address] = size

    def allow(self, address: int, size: int) -> None:
        inside = {at: length for at, length in self.mapped.items() if address <= at < address + size}
        assert sum(inside.values()) == size, "access to unmapped addresses"
        self.accessible |= set(inside)

    def unmap(self, address: int, size: int) -> None:
        assert self.mapped.pop(address) == size, "a mapping is unmapped whole"
        self.accessible.discard(address)
        self.unmap_calls += 1


class FakeEvent:
    passed = True

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


class FakeStream:
    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaMemory]:
    monkeypatch.setattr(cuda, "Driver", CheckedDriver)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    as_tensor = torch.as_tensor
    made: list[CudaMemory] = []

    def viewed(value: Any, **kwargs: Any) -> torch.Tensor:
        interface = getattr(value, "__cuda_array_interface__", None)
        driver: Any = made[0].driver if made else None
        return driver.memory[interface["data"][0]] if interface else as_tensor(value, **kwargs)

    monkeypatch.setattr(torch, "as_tensor", viewed)
    stream: Any = FakeStream()
    made.append(CudaMemory(torch.device("cpu"), SLAB, 48, stream))
    yield made[0]
    made[0].close()


def driver_of(memory: CudaMemory) -> CheckedDriver:
    driver: Any = memory.driver
    return driver


def test_any_order_of_mapping_is_legal(memory: CudaMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    ranges = [memory.reserve(12) for _ in range(3)]
    held: dict[tuple[int, int], int] = {}
    free = list(range(48))
    for step in range(600):
        number = rng.randrange(3)
        chosen = ranges[number]
        assert isinstance(chosen, CudaRange)
        first, count = rng.randrange(12), rng.randrange(1, 5)
        places = range(first, min(first + count, 12))
        FakeEvent.passed = rng.random() < 0.7
        if all((number, place) not in held for place in places) and rng.random() < 0.7:
            rng.shuffle(free)
            slabs = [free.pop() for _ in places]
            chosen.map(first, slabs)
            held |= {(number, place): slab for place, slab in zip(places, slabs, strict=True)}
        elif rng.random() < 0.6:
            chosen.unmap(first, len(places))
            free += [held.pop((number, place)) for place in places if (number, place) in held]
        else:
            memory.tidy()
        assert memory.ledger.num_mapped == len(held) == 48 - len(free), step
        driver = driver_of(memory)
        for held_number, place in held:
            assert ranges[held_number].bytes_view.data_ptr() + place * SLAB in driver.accessible
        # the driver has to know each range's first address, whatever lies there
        assert all(made.bytes_view.data_ptr() in driver.accessible for made in ranges)
    FakeEvent.passed = True
    while memory.tidy():
        pass
    anchors = sum((number, 0) not in held for number in range(3))
    assert len(driver_of(memory).mapped) == len(held) + anchors


def test_the_same_slab_in_the_same_place_costs_nothing(memory: CudaMemory) -> None:
    held = memory.reserve(2)
    held.map(0, [7, 8])
    held.unmap(0, 2)
    before = driver_of(memory).unmap_calls
    held.map(0, [7, 9])
    assert driver_of(memory).unmap_calls == before + 1


@pytest.mark.parametrize("arena_slabs", [48, 0])
def test_a_model_comes_from_the_arena_or_from_disk(memory: CudaMemory, tmp_path: Path, arena_slabs: int) -> None:
    model = tiny("llama")
    arena = HostArena(torch.zeros(arena_slabs * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
    blueprint = draw("m", save(model, tmp_path), None, Prover(fuse=True), num_threads=2, min_group_bytes=1)
    kv = kv_geometry("m", blueprint.shape, 16, 4, SLAB, 16)
    weight_slabs = -(-blueprint.layout.size_bytes // SLAB)
    stream: Any = FakeStream()
    taken = CudaModelMemory(
        memory, stream, arena, memory.reserve(weight_slabs), KvRange(memory.reserve(16)), kv, blueprint.filler, blueprint.identity
    )
    taken.stage(threading.Event())
    assert (taken.host_bytes() > 0) == (arena_slabs > 0)
    built = assemble(blueprint, taken.weights_view, taken.kv_view, kv, torch.float32, taken)
    hardware: Any = None
    pages = [slab * kv.pages_per_slab + block * kv.pages_per_block for slab in range(8) for block in range(kv.blocks_per_slab)]
    resident = Resident(blueprint, hardware, taken, built, pages)
    for index in range(8):
        taken.map_kv(index, 40 + index)
    asked = prompts(VOCAB, [19, 4])
    wanted = hf_logits(model, asked)
    for turn in range(3):
        taken.swap_in(range(turn, turn + weight_slabs))
        assert_same(resident.logits(asked), wanted)
        assert taken.swap_in_done()
        assert not taken.pending
        taken.evict()
        assert taken.pending
        taken.weights_view.zero_()
        if turn == 1:
            taken.drop_host()        # the next return is from disk, and leaves a host copy where there is room
            assert taken.host_bytes() == 0
    assert (taken.host_bytes() > 0) == (arena_slabs > 0)
    taken.swap_in(range(weight_slabs))
    taken.evict()
    taken.close()
    assert arena.free_bytes() == arena.total_bytes
    assert memory.ledger.num_mapped == 0


def test_an_image_is_nobody_elses_from_the_moment_it_is_found(memory: CudaMemory, tmp_path: Path) -> None:
    """A loading thread looks for room in the arena just when a swap-in has found its image there, and queued no copy yet."""
    model = tiny("llama")
    blueprint = draw("m", save(model, tmp_path), None, Prover(fuse=True), num_threads=2, min_group_bytes=1)
    weight_slabs = -(-blueprint.layout.size_bytes // SLAB)
    arena = HostArena(torch.zeros(weight_slabs * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
    kv = kv_geometry("m", blueprint.shape, 16, 4, SLAB, 16)
    stream: Any = FakeStream()
    taken = CudaModelMemory(
        memory, stream, arena, memory.reserve(weight_slabs), KvRange(memory.reserve(16)), kv, blueprint.filler, blueprint.identity
    )
    taken.stage(threading.Event())
    found: Any = arena.find

    def find(*arguments: Any) -> Any:
        image = found(*arguments)
        assert arena.allocate("another model", SLAB) is None, "its chunks would be overwritten while they are copied"
        return image

    arena.find = find  # type: ignore[method-assign]
    taken.swap_in(range(weight_slabs))
    assert taken.host_bytes() > 0
    arena.find = found
    taken.evict()
    assert arena.allocate("another model", SLAB) is not None
    assert taken.host_bytes() == 0
    taken.close()
