"""The same promises on a GPU: stable addresses over changing slabs, copies waited for by group, a graph that survives eviction, a warm host arena."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from common.units import MIB
from runtime.config.schema import EngineConfig
from runtime.engine.interfaces import LoadRequest
from runtime.engine.memory.arena_index import ArenaIndex
from runtime.engine.memory.cuda import CudaMemory
from runtime.engine.memory.cuda_model import CudaModelMemory
from runtime.engine.memory.host_tier import HostTier
from runtime.engine.memory.pinned import PinnedMemory
from runtime.engine.memory.weight_buffer import WeightBuffer
from runtime.engine.model.build.builder import Blueprint, assemble, draw
from runtime.engine.model.build.equivalence_check import EquivalenceChecker
from runtime.engine.model.build.kv_fixture import KvFixture
from runtime.engine.model.run.kv_geometry import kv_geometry
from runtime.engine.model.run.step import BuiltModel
from runtime.errors import LoadFailed
from tests.support.families import VOCAB
from tests.support.graphs import capture_next
from tests.support.kv_copies import check_blocks_return
from tests.support.steps import hf_logits, prompts, save
from tests.support.tiny_models import tiny

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SLAB = 2 * MIB


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def memory(device: torch.device) -> Iterator[CudaMemory]:
    made = CudaMemory(device, SLAB, 16, torch.cuda.current_stream(device))
    yield made
    torch.cuda.synchronize()
    made.close()


def test_slab_carries_its_contents_between_ranges(memory: CudaMemory) -> None:
    a, b = memory.reserve(3), memory.reserve(2)
    address = a.bytes_view.data_ptr()
    a.map(0, [5, 6, 7])
    a.bytes_view[: 3 * SLAB] = 1
    a.bytes_view[SLAB : 2 * SLAB] = 2
    a.unmap(0, 3)
    assert memory.ledger.num_mapped == 0
    b.map(0, [6, 5])
    assert [int(b.bytes_view[0]), int(b.bytes_view[SLAB])] == [2, 1]
    a.map(0, [9, 8, 7])
    a.bytes_view[:SLAB] = 3
    assert [int(b.bytes_view[0]), int(b.bytes_view[SLAB]), int(a.bytes_view[2 * SLAB])] == [2, 1, 1]
    assert a.bytes_view.data_ptr() == address
    a.close()
    b.close()


def test_decommitted_slabs_are_free_for_other_processes(memory: CudaMemory, device: torch.device) -> None:
    held = memory.reserve(8)
    held.map(0, list(range(8)))
    held.bytes_view[: 8 * SLAB] = 3
    held.unmap(0, 8)
    before, _ = torch.cuda.mem_get_info(device)
    memory.decommit(range(8))
    after, _ = torch.cuda.mem_get_info(device)
    assert after - before == 8 * SLAB
    memory.commit(range(4))
    assert torch.cuda.mem_get_info(device)[0] == after - 4 * SLAB
    held.map(0, [3, 2, 1, 0])
    held.bytes_view[: 4 * SLAB] = 4
    assert int(held.bytes_view[: 4 * SLAB].min()) == 4


def test_slab_is_lent_once(memory: CudaMemory) -> None:
    a, b = memory.reserve(2), memory.reserve(2)
    a.map(0, [1])
    with pytest.raises(ValueError, match="slab 1 is mapped already"):
        b.map(0, [1])
    a.unmap(0, 1)
    b.map(0, [1])
    b.bytes_view[:SLAB] = 4
    assert int(b.bytes_view[:SLAB].sum(dtype=torch.int64)) == 4 * SLAB


def test_given_up_places_are_tidied_once_their_work_has_passed(memory: CudaMemory) -> None:
    held = memory.reserve(4)
    held.map(0, [0, 1, 2, 3])
    held.bytes_view[: 4 * SLAB] = 1
    held.unmap(1, 2)
    torch.cuda.synchronize()
    assert memory.tidy()
    assert not memory.tidy()
    held.map(1, [2, 1])
    held.bytes_view[SLAB : 3 * SLAB] = 9
    assert int(held.bytes_view[: 4 * SLAB].sum(dtype=torch.int64)) == 20 * SLAB


def _fill(pointer, count):  # type: ignore[no-untyped-def]
    for at in range(count):
        tl.store(pointer + at, 1)


def test_triton_takes_the_address_of_an_empty_range(memory: CudaMemory) -> None:
    """A kernel that touches nothing there may be launched: idle turns do so for a model without KV."""
    empty, full = memory.reserve(2), memory.reserve(2)
    full.map(0, [3])
    full.unmap(0, 1)
    torch.cuda.synchronize()
    while memory.tidy():
        pass
    for made in (empty, full):
        triton.jit(_fill)[(1,)](made.bytes_view, 0)
        made.map(1, [5])
        triton.jit(_fill)[(1,)](made.bytes_view, 0)
        made.bytes_view[SLAB : SLAB + 4] = 0
        triton.jit(_fill)[(1,)](made.bytes_view[SLAB:], 3)
        assert made.bytes_view[SLAB : SLAB + 4].tolist() == [1, 1, 1, 0]
        made.unmap(1, 1)
    torch.cuda.synchronize()


def test_graph_survives_another_slab_below(memory: CudaMemory) -> None:
    held, out = memory.reserve(1), torch.zeros(SLAB, dtype=torch.uint8, device=memory.device)
    held.map(0, [3])
    held.bytes_view.fill_(5)
    graph = torch.cuda.CUDAGraph()
    torch.add(held.bytes_view, 1, out=out)
    with torch.cuda.graph(graph):
        torch.add(held.bytes_view, 1, out=out)
    graph.replay()
    assert int(out.min()) == int(out.max()) == 6
    held.unmap(0, 1)
    held.map(0, [4])
    held.bytes_view.fill_(8)
    graph.replay()
    assert int(out.min()) == int(out.max()) == 9


class Stage:
    """A tiny model's memory on the GPU, over a small arena."""

    def __init__(
        self, memory: CudaMemory, folder: Path, *, arena_slabs: int = 16, arena_path: str = "", name: str = "llama"
    ) -> None:
        self.model = tiny(name)
        self.memory = memory
        self.pinned = PinnedMemory(arena_slabs * SLAB, arena_path, memory.device)
        self.arena = HostTier(self.pinned.view, SLAB, ArenaIndex(arena_path))
        self.pinned.start_registering()
        checkpoint = save(self.model, folder)
        self.blueprint: Blueprint = draw(
            "m", checkpoint, None, EquivalenceChecker(fuse=True), num_threads=4, min_group_bytes=1, layout_4bit="kernel"
        )
        self.kv = kv_geometry("m", self.blueprint.shape, 16, 4, SLAB, 8)
        self.weight_slabs = -(-self.blueprint.layout.size_bytes // SLAB)
        self.model_memory = CudaModelMemory(
            memory, torch.cuda.Stream(memory.device), torch.cuda.Stream(memory.device), self.arena, memory.reserve(self.weight_slabs), memory.reserve(8), self.kv,
            self.blueprint.filler, self.blueprint.identity,
        )  # fmt: skip
        self.model_memory.stage(threading.Event())
        self.built: BuiltModel = assemble(
            self.blueprint,
            self.model_memory.weights_view,
            self.model_memory.kv_view,
            self.kv,
            torch.float32,
            self.model_memory,
        )

    def logits(self, prompt: torch.Tensor) -> torch.Tensor:
        pages = [block * self.kv.pages_per_block for block in range(self.kv.blocks_per_slab)]
        rows = KvFixture(self.built.planes, self.built.token_stride, 16, pages, 2, 8, self.memory.device)
        positions, context = rows.step([(0, 0, len(prompt))])
        with torch.inference_mode():
            return self.built.forward(
                prompt.to(self.memory.device), positions, torch.arange(len(prompt), device=self.memory.device), context
            ).cpu()

    def close(self) -> None:
        torch.cuda.synchronize()
        self.model_memory.close()
        self.pinned.close()


@pytest.mark.parametrize("arena_slabs", [16, 1])
def test_weights_leave_and_return(memory: CudaMemory, tmp_path: Path, arena_slabs: int) -> None:
    """With room in the arena, and without: the first of two models that need its only chunk comes from disk every time."""
    stage = Stage(memory, tmp_path, arena_slabs=arena_slabs)
    if arena_slabs == 1:
        stage.model_memory.drop_host()
        blocker = stage.arena.allocate("other", SLAB)
        assert blocker is not None
        assert stage.model_memory.host_bytes() == 0
    (prompt,) = prompts(VOCAB, [23])
    (wanted,) = hf_logits(stage.model, [prompt])
    stage.model_memory.map_kv(0, 15)
    for slabs in (range(stage.weight_slabs), range(5, 5 + stage.weight_slabs)):
        stage.model_memory.swap_in(slabs)
        torch.testing.assert_close(
            stage.logits(prompt), wanted, atol=2e-3, rtol=2e-3
        )  # TF32 is off, but other kernels add in other orders
        torch.cuda.synchronize()
        assert stage.model_memory.swap_in_done()
        assert not stage.model_memory.pending
        stage.model_memory.evict()
        assert stage.model_memory.pending
    assert memory.ledger.num_mapped == 1
    stage.close()
    assert memory.ledger.num_mapped == 0


def test_saved_kv_returns_to_other_places(memory: CudaMemory, tmp_path: Path) -> None:
    stage = Stage(memory, tmp_path)
    free_bytes = stage.arena.free_bytes()
    for _ in range(3):
        check_blocks_return(stage.model_memory, SLAB, 0, torch.cuda.synchronize)
    assert stage.arena.free_bytes() == free_bytes
    stage.close()


def test_evicted_while_it_comes_in(memory: CudaMemory, tmp_path: Path) -> None:
    stage = Stage(memory, tmp_path)
    for _ in range(5):
        stage.model_memory.swap_in(range(stage.weight_slabs))
        stage.model_memory.evict()
    stage.model_memory.map_kv(0, 15)
    stage.model_memory.swap_in(range(stage.weight_slabs))
    (prompt,) = prompts(VOCAB, [9])
    torch.testing.assert_close(stage.logits(prompt), hf_logits(stage.model, [prompt])[0], atol=2e-3, rtol=2e-3)
    stage.close()


class UnreadableFiller:
    """Fails whenever a model is read from its files."""

    def __init__(self, group_ends: tuple[int, ...]) -> None:
        self.group_ends = group_ends

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        raise LoadFailed("read from disk again")


def test_engine_that_returns_finds_its_models_warm(memory: CudaMemory, tmp_path: Path) -> None:
    path = str(tmp_path / "arena")
    first = Stage(memory, tmp_path / "model", arena_path=path)
    first.close()
    filler = UnreadableFiller(first.blueprint.filler.group_ends)
    pinned = PinnedMemory(16 * SLAB, path, memory.device)
    arena = HostTier(pinned.view, SLAB, ArenaIndex(path))
    again = CudaModelMemory(
        memory, torch.cuda.Stream(memory.device), torch.cuda.Stream(memory.device), arena, memory.reserve(first.weight_slabs), memory.reserve(8), first.kv, filler,
        first.blueprint.identity,
    )  # fmt: skip
    again.stage(threading.Event())
    assert again.host_bytes() > 0
    again.swap_in(range(first.weight_slabs))
    torch.cuda.synchronize()
    assert again.swap_in_done()
    again.close()


def test_registered_memory_is_pinned(device: torch.device) -> None:
    pinned = PinnedMemory(64 * MIB, "", device)
    pinned.start_registering()
    deadline = time.monotonic() + 20
    while pinned.registered_bytes < pinned.size_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pinned.registered_bytes == pinned.size_bytes
    assert pinned.view[:1024].is_pinned()
    pinned.close()


def test_backend_loads_and_gives_back(tmp_path: Path) -> None:
    from runtime.engine.device.backend import make_backend

    backend = make_backend(
        EngineConfig(
            device="cuda",
            slab_bytes=SLAB,
            device_budget_bytes=64 * SLAB,
            host_budget_bytes=64 * SLAB,
            max_rows=8,
            max_batch_tokens=256,
        )
    )
    assert backend.total_slabs == 64
    loaded = backend.load(LoadRequest("m", save(tiny("llama"), tmp_path), None)).result()
    free_bytes = backend.host_free_bytes()
    assert free_bytes < backend.host_total_bytes
    loaded.memory.swap_in(range(loaded.memory.weight_slabs))
    backend.synchronize()
    assert loaded.memory.swap_in_done()
    loaded.memory.evict()
    loaded.memory.close()
    while backend.idle():
        pass
    backend.close()


def test_idle_turns_capture_what_is_likely_before_the_first_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A model just loaded has no KV: nothing of its own lies below the addresses that its kernels are handed."""
    from runtime.engine.device.backend import make_backend

    backend = make_backend(
        EngineConfig(
            device="cuda",
            slab_bytes=SLAB,
            device_budget_bytes=64 * SLAB,
            host_budget_bytes=64 * SLAB,
            max_rows=8,
            max_batch_tokens=96,
        )
    )
    loaded = backend.load(LoadRequest("m", save(tiny("llama"), tmp_path), None)).result()
    loaded.memory.swap_in(range(loaded.memory.weight_slabs))
    turns, deadline_s = 0, time.monotonic() + 60
    while turns < 8 and time.monotonic() < deadline_s:
        if capture_next(backend, {"m": loaded.runner}) or backend.idle():
            turns += 1
        else:
            time.sleep(0.01)
    assert turns == 8
    assert "without CUDA graphs" not in caplog.text
    backend.synchronize()
    loaded.runner.close()
    loaded.memory.evict()
    loaded.memory.close()
    backend.close()
