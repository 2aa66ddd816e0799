"""Slabs under ranges on a CPU, fills and their cancellation, the host arena with its index: nothing is lent twice, lost, or found half filled."""

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from runtime.engine.memory.arena_index import ArenaIndex, IndexEntry
from runtime.engine.memory.background_load import BackgroundLoad
from runtime.engine.memory.cpu import CpuMemory
from runtime.engine.memory.host_tier import HostTier, HostWeights
from runtime.engine.memory.pinned import PinnedMemory, populate, shared_memory_free_bytes
from runtime.engine.memory.weight_buffer import Contiguous, WeightBuffer
from runtime.errors import Cancelled, LoadFailed

SLAB = 8192


def test_range_keeps_its_address_and_loses_its_contents() -> None:
    memory = CpuMemory(SLAB, 6)
    held = memory.reserve(3)
    address = held.bytes_view.data_ptr()
    held.map(0, [4, 0])
    held.bytes_view[: 2 * SLAB] = 7
    held.map(2, [5])
    assert memory.ledger.num_mapped == 3
    held.unmap(0, 1)
    assert int(held.bytes_view[:SLAB].sum()) == 0
    assert int(held.bytes_view[SLAB : 2 * SLAB].sum()) == 7 * SLAB
    held.map(0, [4])
    assert held.bytes_view.data_ptr() == address
    held.close()
    assert memory.ledger.num_mapped == 0


def test_slab_is_mapped_in_one_place_only() -> None:
    memory = CpuMemory(SLAB, 4)
    a, b = memory.reserve(2), memory.reserve(2)
    a.map(0, [1])
    with pytest.raises(ValueError, match="slab 1 is mapped already"):
        b.map(0, [1])
    with pytest.raises(ValueError, match="not all empty"):
        a.map(0, [2])
    with pytest.raises(ValueError, match="slab 4 of 4"):
        b.map(0, [4])
    with pytest.raises(ValueError, match="named twice"):
        b.map(0, [2, 2])
    a.unmap(0, 1)
    b.map(0, [1])
    with pytest.raises(ValueError, match="page size"):
        CpuMemory(1000, 1)


def test_slab_without_memory_is_not_mapped() -> None:
    memory = CpuMemory(SLAB, 4, committed=2)
    held = memory.reserve(2)
    with pytest.raises(ValueError, match="slab 2 has no memory"):
        held.map(0, [2])
    memory.commit([2])
    held.map(0, [2])
    with pytest.raises(ValueError, match="is mapped"):
        memory.decommit([2])
    held.unmap(0, 1)
    memory.decommit([2, 3])
    assert memory.ledger.num_committed == 2
    with pytest.raises(ValueError, match="has memory already"):
        memory.commit([1, 2])


class ScriptedFiller:
    """Three groups; waits for a word before each."""

    group_ends: tuple[int, ...] = (10, 20, 30)

    def __init__(self, error: Exception | None = None) -> None:
        self.go = [threading.Event() for _ in self.group_ends]
        self.error = error

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        for group, end in enumerate(self.group_ends):
            while not self.go[group].wait(0.01):
                if cancelled.is_set():
                    raise Cancelled("stopped")
            if self.error is not None and group == 1:
                raise self.error
            for piece in image.pieces(end - 10, 10):
                piece.fill_(group + 1)
            on_group(group)


def test_whoever_waits_for_a_group_sees_its_bytes() -> None:
    filler = ScriptedFiller()
    memory = torch.zeros(30, dtype=torch.uint8)
    filling = BackgroundLoad(filler, Contiguous(memory))
    for group in range(3):
        assert not filling.done()
        filler.go[group].set()
        filling.wait(group)
        assert memory[group * 10 : group * 10 + 10].tolist() == [group + 1] * 10
    assert filling.done()
    assert filling.failed() is None


def test_host_image_reports_a_failed_fill_to_those_that_wait() -> None:
    for error, kind in ((LoadFailed("gone"), LoadFailed), (RuntimeError("odd"), LoadFailed)):
        filler = ScriptedFiller(error)
        for event in filler.go:
            event.set()
        filling = BackgroundLoad(filler, Contiguous(torch.zeros(30, dtype=torch.uint8)))
        filling.wait(0)
        with pytest.raises(kind):
            filling.wait(1)
        assert filling.done()


def test_cancel_leaves_no_writer() -> None:
    filler = ScriptedFiller()
    filling = BackgroundLoad(filler, Contiguous(torch.zeros(30, dtype=torch.uint8)))
    filling.cancel()
    assert filling.done()
    with pytest.raises(Cancelled):
        filling.wait(0)


CHUNK = 64


def arena(total_chunks: int, path: str = "") -> HostTier:
    return HostTier(torch.zeros(total_chunks * CHUNK, dtype=torch.uint8), CHUNK, ArenaIndex(path))


def put(host: HostTier, key: str, size: int, fill: int = 1) -> HostWeights | None:
    image = host.allocate(key, size)
    if image is not None:
        for piece in image.pieces(0, size):
            piece.fill_(fill)
        host.commit(image)
    return image


def test_host_arena_evicts_the_least_recently_used_image() -> None:
    host = arena(4)
    a, b = put(host, "a", 2 * CHUNK), put(host, "b", 2 * CHUNK)
    assert a is not None
    assert b is not None
    assert host.find("a") is a
    assert put(host, "c", CHUNK) is not None
    assert b.gone
    assert host.find("b") is None
    assert host.find("a") is a
    assert not a.gone


def test_host_arena_keeps_an_image_in_use() -> None:
    host = arena(4)
    reading = True
    a = put(host, "a", 3 * CHUNK)
    assert a is not None
    a.readers.append(lambda: reading)
    assert put(host, "b", 2 * CHUNK) is None
    assert host.free_bytes() == CHUNK
    reading = False
    assert put(host, "b", 2 * CHUNK) is not None
    assert a.gone


def test_host_arena_does_not_find_an_image_that_is_being_filled() -> None:
    host = arena(4)
    image = host.allocate("a", CHUNK)
    assert image is not None
    assert host.find("a") is None
    assert host.allocate("a", CHUNK) is None
    assert host.allocate("b", 4 * CHUNK) is None
    host.drop(image)
    assert host.free_bytes() == 4 * CHUNK


def test_pieces_follow_the_chunks() -> None:
    host = arena(5)
    put(host, "a", CHUNK)
    b = put(host, "b", 3 * CHUNK - 7, fill=2)
    assert b is not None
    pieces = list(b.pieces(10, 2 * CHUNK))
    assert sum(piece.numel() for piece in pieces) == 2 * CHUNK
    assert [piece.numel() for piece in pieces] == [CHUNK - 10, CHUNK, 10]
    assert all(int(piece.min()) == int(piece.max()) == 2 for piece in pieces)


def test_images_outlive_the_engine(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    memory = torch.zeros(6 * CHUNK, dtype=torch.uint8)
    first = HostTier(memory, CHUNK, ArenaIndex(path))
    for key in ("a", "b"):
        put(first, key, 2 * CHUNK, fill=ord(key))
    first.find("a")
    half = first.allocate("half", 2 * CHUNK)
    assert half is not None

    second = HostTier(memory, CHUNK, ArenaIndex(path))
    assert second.find("half") is None
    assert second.free_bytes() == 6 * CHUNK
    b = second.find("b")
    assert b is not None
    assert [int(piece[0]) for piece in b.pieces(0, 2 * CHUNK)] == [ord("b")] * 2
    # the image that was never requested goes first
    assert put(second, "c", 4 * CHUNK) is not None
    assert second.find("a") is None
    assert second.find("b") is b


def test_host_arena_ignores_the_index_of_another(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    index = ArenaIndex(path)
    index.write(CHUNK, 4, (IndexEntry("a", CHUNK, (0,)),))
    assert len(index.read(CHUNK, 4)) == 1
    assert index.read(CHUNK, 5) == ()
    assert index.read(2 * CHUNK, 4) == ()
    index.write(CHUNK, 4, (IndexEntry("a", CHUNK, (0,)), IndexEntry("b", CHUNK, (0,))))
    assert index.read(CHUNK, 4) == ()
    Path(f"{path}.index").write_bytes(b"\x93damaged")
    assert index.read(CHUNK, 4) == ()


def test_shared_memory_that_is_full_costs_the_index_and_no_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "arena")
    host = arena(4, path)
    assert put(host, "a", 4 * CHUNK) is not None
    write_bytes = Path.write_bytes

    def full(file: Path, data: bytes) -> int:
        write_bytes(file, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert put(host, "b", 4 * CHUNK) is not None  # in the chunks of a
    monkeypatch.undo()
    assert arena(4, path).find("a") is None
    assert put(host, "c", CHUNK) is not None
    assert arena(4, path).find("c") is not None


def test_chunks_are_never_lost() -> None:
    host, rng = arena(12), random.Random(0)
    in_use: dict[str, bool] = {}
    for step in range(400):
        key = f"m{rng.randrange(8)}"
        action = rng.random()
        if action < 0.5:
            image = host.find(key) or put(host, key, rng.randrange(1, 6 * CHUNK))
            if image is not None and not image.readers:
                in_use[key] = rng.random() < 0.3
                image.readers.append(partial(in_use.__getitem__, key))
        elif action < 0.7:
            in_use[key] = not in_use.get(key, False)
        elif (image := host.find(key)) is not None and not image.busy():
            host.drop(image)
        held = [chunk for i in range(8) if (image := host.find(f"m{i}")) is not None for chunk in image.chunks]
        assert len(set(held)) == len(held), step
        assert len(held) + host.num_free_chunks == 12, step


def test_shared_arena_keeps_its_bytes(tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    size = 3 * 4096
    first = PinnedMemory(size, path, torch.device("cpu"))
    first.view[:] = 9
    assert populate(first.view, threading.Event())
    assert int(first.view.min()) == 9
    second = PinnedMemory(size, path, torch.device("cpu"))
    assert int(second.view.min()) == 9
    other = PinnedMemory(2 * size, path, torch.device("cpu"))
    assert int(other.view.max()) == 0
    assert shared_memory_free_bytes(path) > 2 * size


def test_swapping_in_waits_for_nobody_else() -> None:
    """Two fills at once end independently."""
    slow, quick = ScriptedFiller(), ScriptedFiller()
    fillings = [BackgroundLoad(filler, Contiguous(torch.zeros(30, dtype=torch.uint8))) for filler in (slow, quick)]
    for event in quick.go:
        event.set()
    fillings[1].wait(2)
    assert not fillings[0].done()
    fillings[0].cancel()
    deadline = time.monotonic() + 5
    while not fillings[0].done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fillings[0].done()
