"""The GPU side's bookkeeping without a GPU: a driver that checks every call, events that a test lets pass. What the calls do is test_cuda_memory's."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.engine.interfaces import KvGeometry
from runtime.engine.memory.arena_index import ArenaIndex
from runtime.engine.memory.cuda import CudaError, CudaMemory, CudaRange
from runtime.engine.memory.cuda_model import CudaModelMemory
from runtime.engine.memory.host_tier import HostTier
from runtime.engine.model.build.builder import Blueprint, assemble, draw
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.engine.model.run.kv_geometry import kv_geometry
from tests.support.cuda_device import CheckedDriver, Device
from tests.support.families import VOCAB
from tests.support.kv_copies import check_blocks_return
from tests.support.steps import Resident, hf_logits, prompts, save
from tests.support.tiny_models import assert_same, tiny

SLAB = 64 * 1024


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    made.install(monkeypatch)
    return made


@pytest.fixture
def memory(device: Device) -> Iterator[CudaMemory]:
    stream: Any = device.compute
    made = CudaMemory(torch.device("cpu"), SLAB, 48, stream)
    yield made
    made.close()
    assert not driver_of(made).handles
    assert not driver_of(made).num_reserved


def driver_of(memory: CudaMemory) -> CheckedDriver:
    driver: Any = memory.driver
    assert isinstance(driver, CheckedDriver)
    return driver


def test_mapping_order_is_legal(memory: CudaMemory, device: Device) -> None:
    rng = random.Random(1)
    ranges = [memory.reserve(12) for _ in range(3)]
    held: dict[tuple[int, int], int] = {}
    free, away = list(range(48)), list[int]()
    for step in range(600):
        number = rng.randrange(3)
        chosen = ranges[number]
        assert isinstance(chosen, CudaRange)
        first, count = rng.randrange(12), rng.randrange(1, 5)
        places = range(first, min(first + count, 12))
        for used_number, place in rng.sample(sorted(held), min(3, len(held))):
            device.launch(device.compute, writes=[(ranges[used_number].bytes_view.data_ptr() + place * SLAB, SLAB)])
        for _ in range(rng.randrange(8)):
            device.advance()
        if all((number, place) not in held for place in places) and rng.random() < 0.7:
            rng.shuffle(free)
            slabs = [free.pop() for _ in places]
            chosen.map(first, slabs)
            held |= {(number, place): slab for place, slab in zip(places, slabs, strict=True)}
        elif rng.random() < 0.6:
            chosen.unmap(first, len(places))
            free += [held.pop((number, place)) for place in places if (number, place) in held]
        elif rng.random() < 0.5:
            # Some of the free slabs go to another engine, or come back.
            rng.shuffle(free)
            count = rng.randrange(6)
            if rng.random() < 0.5:
                memory.decommit(free[:count])
                away, free = away + free[:count], free[count:]
            else:
                memory.commit(away[:count])
                free, away = free + away[:count], away[count:]
        else:
            memory.tidy()
        assert memory.ledger.num_mapped == len(held) == 48 - len(free) - len(away), step
        driver = driver_of(memory)
        assert len(driver.handles) == 1 + memory.ledger.num_committed == 49 - len(away)
        for held_number, place in held:
            assert driver.knows(ranges[held_number].bytes_view.data_ptr() + place * SLAB)
        # the driver has to know each range's first address, whatever lies there
        assert all(driver.knows(made.bytes_view.data_ptr()) for made in ranges)
    while device.advance():
        pass
    while memory.tidy():
        pass
    anchors = sum((number, 0) not in held for number in range(3))
    assert driver_of(memory).num_mapped == len(held) + anchors


def test_decommitted_slab_is_released_after_the_work_that_uses_it(memory: CudaMemory, device: Device) -> None:
    held = memory.reserve(2)
    held.map(0, [3, 4])
    address = held.bytes_view.data_ptr()
    device.launch(device.compute, writes=[(address, 2 * SLAB)])
    with pytest.raises(ValueError, match=r"one of the slabs \[3\] is mapped"):
        memory.decommit([3])
    held.unmap(0, 2)
    before = len(driver_of(memory).handles)
    memory.decommit([3, 4])
    assert len(driver_of(memory).handles) == before - 2
    assert not device.in_use(address, 2 * SLAB)
    assert driver_of(memory).knows(address)  # the range's first address keeps memory
    memory.decommit([3])  # has none
    with pytest.raises(ValueError, match="slab 3 has no memory"):
        held.map(0, [3])
    memory.commit([3])
    held.map(0, [3])


def test_commit_that_fails_takes_nothing(memory: CudaMemory, device: Device) -> None:
    memory.decommit(range(10))
    calls = iter(range(100))

    def fail(call: str) -> None:
        if next(calls) == 4:
            raise CudaError("cuMemCreate failed on device 0: CUDA_ERROR_OUT_OF_MEMORY")

    device.failing = fail
    with pytest.raises(CudaError, match="4 of 6 slabs"):
        memory.commit(range(6))
    assert len(driver_of(memory).handles) == 1 + 38
    assert memory.ledger.num_committed == 38
    memory.commit(range(6))


def test_mapping_of_the_same_slab_in_the_same_place_is_free(memory: CudaMemory) -> None:
    held = memory.reserve(2)
    held.map(0, [7, 8])
    held.unmap(0, 2)
    before = driver_of(memory).unmap_calls
    held.map(0, [7, 9])
    assert driver_of(memory).unmap_calls == before + 1


@pytest.mark.parametrize("failing", range(6))
def test_mapping_that_fails_leaves_nothing(memory: CudaMemory, device: Device, failing: int) -> None:
    """Wherever the driver gives up: the slabs can go elsewhere, the places can be filled later, and kernels may be handed the address."""
    held, other = memory.reserve(4), memory.reserve(4)
    held.map(1, [9])
    held.unmap(1, 1)
    calls = iter(range(100))

    def fail(call: str) -> None:
        if next(calls) == failing:
            raise CudaError(f"{call} failed")

    device.failing = fail
    try:
        held.map(0, [5, 6, 7, 8])
    except CudaError:
        device.failing = lambda call: None
        assert memory.ledger.num_mapped == 0
        assert driver_of(memory).knows(held.bytes_view.data_ptr())
        other.map(0, [8, 7, 6, 5])
        held.map(0, [1, 2, 3, 4])
    else:
        assert failing == 5, "four places, and one grant for all of them"
    assert all(driver_of(memory).knows(held.bytes_view.data_ptr() + place * SLAB) for place in range(4))


def test_cuda_memory_names_how_many_slabs_were_allocated(memory: CudaMemory, device: Device) -> None:
    calls = iter(range(100))

    def fail(call: str) -> None:
        if next(calls) == 7:
            raise CudaError("cuMemCreate failed on device 0: CUDA_ERROR_OUT_OF_MEMORY")

    device.failing = fail
    stream: Any = device.compute
    with pytest.raises(
        CudaError,
        match=f"6 of 48 slabs of {SLAB} bytes could be allocated: cuMemCreate failed on device 0: CUDA_ERROR_OUT_OF_MEMORY",
    ):
        CudaMemory(torch.device("cpu"), SLAB, 48, stream)
    assert not device.drivers[-1].handles


def test_range_that_cannot_be_made_leaves_no_addresses(memory: CudaMemory, device: Device) -> None:
    for failing in ("reserve", "map", "allow"):

        def fail(call: str, failing: str = failing) -> None:
            if call == failing:
                raise CudaError(f"{call} failed")

        device.failing = fail
        with pytest.raises(CudaError):
            memory.reserve(3)
        assert driver_of(memory).num_reserved == 0
    device.failing = lambda call: None


def staged(
    memory: CudaMemory, streams: tuple[Any, Any], arena: HostTier, blueprint: Blueprint, kv: KvGeometry
) -> CudaModelMemory:
    """Return a model's memory, whose weights are in the arena if they have room there. `streams`: of copies of weights and of KV."""
    taken = CudaModelMemory(
        memory,
        *streams,
        arena,
        memory.reserve(-(-blueprint.layout.size_bytes // SLAB)),
        memory.reserve(16),
        kv,
        blueprint.filler,
        blueprint.identity,
    )
    taken.stage(threading.Event())
    return taken


@pytest.mark.parametrize("arena_slabs", [48, 0])
def test_swap_in_reads_the_arena_or_the_disk(
    memory: CudaMemory, device: Device, tmp_path: Path, arena_slabs: int
) -> None:
    model = tiny("llama")
    arena = HostTier(torch.zeros(arena_slabs * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
    blueprint = draw("m", save(model, tmp_path), None, EquivalenceChecker(fuse=True), num_threads=2, min_group_bytes=1)
    kv = kv_geometry("m", blueprint.shape, 16, 4, SLAB, 16)
    weight_slabs = -(-blueprint.layout.size_bytes // SLAB)
    stream: Any = device.stream()
    taken = staged(memory, (stream, device.stream()), arena, blueprint, kv)
    assert (taken.host_bytes() > 0) == (arena_slabs > 0)
    built = assemble(blueprint, taken.weights_view, taken.kv_view, kv, torch.float32, taken)
    hardware: Any = None
    pages = [
        slab * kv.pages_per_slab + block * kv.pages_per_block
        for slab in range(8)
        for block in range(kv.blocks_per_slab)
    ]
    resident = Resident(blueprint, hardware, taken, built, pages)
    for index in range(8):
        taken.map_kv(index, 40 + index)
    asked = prompts(VOCAB, [19, 4])
    wanted = hf_logits(model, asked)
    for turn in range(3):
        taken.swap_in(range(turn, turn + weight_slabs))
        assert_same(resident.logits(asked), wanted)
        while device.advance():
            pass
        assert taken.swap_in_done()
        pending = [taken.pending]
        taken.evict()
        pending.append(taken.pending)
        assert pending == [False, True]
        taken.weights_view.zero_()
        if turn == 1:
            taken.drop_host()  # the next return is from disk, and leaves a host copy where there is room
            assert taken.host_bytes() == 0
    assert (taken.host_bytes() > 0) == (arena_slabs > 0)
    taken.swap_in(range(weight_slabs))
    taken.evict()
    taken.close()
    assert arena.free_bytes() == arena.total_bytes
    assert memory.ledger.num_mapped == 0


def test_host_image_is_held_from_the_moment_it_is_found(memory: CudaMemory, device: Device, tmp_path: Path) -> None:
    """A loading thread looks for room in the arena just when a swap-in has found its image there, and queued no copy yet."""
    model = tiny("llama")
    blueprint = draw("m", save(model, tmp_path), None, EquivalenceChecker(fuse=True), num_threads=2, min_group_bytes=1)
    weight_slabs = -(-blueprint.layout.size_bytes // SLAB)
    arena = HostTier(torch.zeros(weight_slabs * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
    kv = kv_geometry("m", blueprint.shape, 16, 4, SLAB, 16)
    stream: Any = device.stream()
    taken = staged(memory, (stream, device.stream()), arena, blueprint, kv)
    found: Any = arena.find

    def find(*arguments: Any) -> Any:
        image = found(*arguments)
        assert arena.allocate("another model", SLAB) is None, "its chunks would be overwritten while they are copied"
        return image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "find", find)
        taken.swap_in(range(weight_slabs))
        assert taken.host_bytes() > 0
    taken.evict()
    while device.advance():
        pass
    assert arena.allocate("another model", SLAB) is not None
    assert taken.host_bytes() == 0
    taken.close()


def test_saved_kv_returns_to_other_places(memory: CudaMemory, device: Device, tmp_path: Path) -> None:
    """The stand-in finds out a slab's next user that does not wait for the copy."""
    model = tiny("llama")
    blueprint = draw("m", save(model, tmp_path), None, EquivalenceChecker(fuse=True), num_threads=2, min_group_bytes=1)
    weight_slabs = -(-blueprint.layout.size_bytes // SLAB)
    arena = HostTier(torch.zeros((weight_slabs + 1) * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
    kv = kv_geometry("m", blueprint.shape, 4, 4, SLAB, 16)
    copies, kv_copies = device.stream(), device.stream()
    taken = staged(memory, (copies, kv_copies), arena, blueprint, kv)
    free_bytes = arena.free_bytes()

    def drain() -> None:
        while device.advance():
            pass

    for _ in range(3):
        check_blocks_return(taken, SLAB, 0, drain)
        assert arena.free_bytes() == free_bytes
    taken.close()
    assert memory.ledger.num_mapped == 0


def test_arena_chunk_displaces_only_images_without_holders() -> None:
    arena = HostTier(torch.zeros(3 * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
    held = arena.allocate("held", SLAB, lambda: False)
    left = arena.allocate("left", 2 * SLAB)
    assert held is not None
    assert left is not None
    assert arena.take_chunk() is None, "an image that is being filled stays"
    arena.commit(held)
    arena.commit(left)
    taken = [arena.take_chunk() for _ in range(3)]
    assert taken[2] is None
    assert left.gone
    assert not held.gone
    assert {*held.chunks, taken[0], taken[1]} == {0, 1, 2}
    assert arena.free_bytes() == 0
    for number in taken[:2]:
        assert number is not None
        arena.give_chunk(number)
    assert arena.free_bytes() == 2 * SLAB
