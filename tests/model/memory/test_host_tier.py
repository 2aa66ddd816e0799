"""How large the host tier is and where it lies: within a container's memory, and only in shared memory that holds it."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from common.units import MIB
from runtime.config.schema import EngineConfig
from runtime.engine.device import cuda
from runtime.engine.device.cuda import host_tier
from runtime.engine.memory.free_memory import free_bytes
from runtime.engine.memory.pinned import PinnedMemory, shared_memory_free_bytes
from tests.support.waiting import wait_until

SLAB = 2 * MIB
MACHINE = 64 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    monkeypatch.setattr(cuda, "free_memory_bytes", lambda: MACHINE)


def group(folder: Path, limit: str, used: int, files: int, *, v1: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    prefix = "total_" if v1 else ""
    (folder / "memory.stat").write_text(
        f"anon 1\n{prefix}inactive_file {files // 4}\n{prefix}active_file {files - files // 4}\n"
    )


def test_free_memory_counts_a_containers_limit_and_no_pages_of_files(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("0::/\n")
    assert free_bytes(groups, own) == MACHINE
    group(groups, "max", 9 << 30, 0)
    assert free_bytes(groups, own) == MACHINE
    group(groups, str(8 << 30), 5 << 30, 2 << 30)
    assert free_bytes(groups, own) == 5 << 30
    group(groups, str(8 << 30), 9 << 30, 0)
    assert free_bytes(groups, own) == 0


def test_free_memory_is_below_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("0::/pods/one/container\n")
    group(groups / "pods" / "one" / "container", "max", 1, 0)
    group(groups / "pods" / "one", str(6 << 30), 1 << 30, 0)
    group(groups / "pods", str(40 << 30), 1 << 30, 0)
    assert free_bytes(groups, own) == 5 << 30


def test_free_memory_reads_cgroups_of_version_1(tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/machine/4f2\n4:memory:/machine/4f2\n")
    group(groups / "memory", str(4 << 30), 3 << 30, 1 << 30, v1=True)
    assert free_bytes(groups, own) == 2 << 30


def shared(monkeypatch: pytest.MonkeyPatch, folder: Path, free: int) -> str:
    """An arena's empty file on a file system with so much room."""
    path = folder / "arena"
    path.touch()
    held = [0]

    def room(where: object) -> object:
        del where
        held[0] = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
        return SimpleNamespace(f_bavail=(free - held[0]) // 512, f_frsize=512)

    monkeypatch.setattr(os, "statvfs", room)
    return str(path)


@pytest.mark.parametrize("room_slabs", [10, 10.4])
def test_shared_memory_is_never_filled_to_the_brim_and_the_size_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room_slabs: float
) -> None:
    path = shared(monkeypatch, tmp_path, int(room_slabs * SLAB))
    config = EngineConfig(host_arena_path=path, host_budget_bytes=12 * SLAB)
    assert host_tier(config, SLAB) == (path, 9 * SLAB)
    Path(path).write_bytes(b"x" * 9 * SLAB)
    Path(f"{path}.index").write_bytes(b"x" * 5000)  # what the first engine kept would else be cut off by the second
    assert host_tier(config, SLAB) == (path, 9 * SLAB)
    assert shared_memory_free_bytes(path) >= 9 * SLAB


@pytest.mark.parametrize("room_slabs", [0, 1, 5])
def test_shared_memory_that_holds_little_is_no_place_for_the_arena(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, room_slabs: int
) -> None:
    path = shared(monkeypatch, tmp_path, room_slabs * SLAB)
    assert host_tier(EngineConfig(host_arena_path=path, host_budget_bytes=12 * SLAB), SLAB) == ("", 12 * SLAB)
    assert f"of the {12 * SLAB} bytes wanted" in caplog.text


def test_host_tier_takes_half_of_free_memory_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert host_tier(EngineConfig(), SLAB) == ("", MACHINE // 2)
    path = shared(monkeypatch, tmp_path, MACHINE)
    assert host_tier(EngineConfig(host_arena_path=path), SLAB) == (path, MACHINE // 2)
    Path(path).write_bytes(b"x" * 3 * SLAB)
    assert host_tier(EngineConfig(host_arena_path=path), SLAB) == (path, 3 * SLAB)


@pytest.mark.parametrize("chunk_mib", [1, 48, 64, 96])
def test_host_tier_registers_whole_chunks(monkeypatch: pytest.MonkeyPatch, chunk_mib: int) -> None:
    """The driver refuses a copy from memory of which it knows a part."""
    registered: list[tuple[int, int]] = []

    def register(address: int, size: int, flags: int) -> int:
        del flags
        registered.append((address, size))
        return 0

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
    )
    monkeypatch.setattr("runtime.engine.memory.pinned.populate", lambda pages, stopping: True)
    pinned = PinnedMemory(5 * chunk_mib * MIB, "", torch.device("cpu"), chunk_mib * MIB)
    pinned.start_registering()
    wait_until(lambda: pinned.registered_bytes == pinned.size_bytes)
    base = pinned.view.data_ptr()
    assert [address - base for address, _ in registered] == [
        sum(size for _, size in registered[:i]) for i in range(len(registered))
    ]
    assert all((address - base) % (chunk_mib * MIB) == 0 for address, _ in registered)
    pinned.close()
