"""Random lives of models on a GPU's memory, over stand-ins that suffer nothing a real driver would not: loads, passes, KV, graphs in idle turns,
evictions amid copies, unloads and returns, calls that fail. What lies in the memory is test_cuda_memory's."""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from runtime.engine.interfaces import Bucket, KvGeometry
from runtime.engine.memory.arena_index import ArenaIndex
from runtime.engine.memory.cuda import CudaError, CudaMemory
from runtime.engine.memory.cuda_model import CudaModelMemory
from runtime.engine.memory.host_tier import HostTier
from runtime.engine.memory.slab_pool import SlabPool
from runtime.engine.memory.weight_buffer import WeightBuffer
from runtime.engine.model.run.cuda_graphs import GraphPool, ModelGraphs
from tests.support.cuda_device import Device
from tests.support.graphs import capture_next, use
from tests.support.torch_graphs import TorchGraphs

SLAB = 4096
SLABS = 24
GEOMETRY = KvGeometry(
    block_tokens=16, blocks_per_slab=4, pages_per_slab=4, pages_per_block=1, bytes_per_token=64, max_slabs=8
)
BUCKETS = tuple(Bucket(n, n, 1, 1024) for n in (1, 2, 4))


class Bytes:
    """Implements Filler. Groups end where slabs do, since the stand-in knows what was written by slabs."""

    def __init__(self, device: Device, size_bytes: int, groups: int) -> None:
        self._device = device
        cuts = {min(-(-size_bytes * (i + 1) // groups // SLAB) * SLAB, size_bytes) for i in range(groups)}
        self.group_ends = tuple(sorted(cuts))

    def fill(self, image: WeightBuffer, cancelled: threading.Event, on_group: Callable[[int], None]) -> None:
        for group in range(len(self.group_ends)):
            if cancelled.is_set():
                return
            start = self.group_ends[group - 1] if group else 0
            for piece in image.pieces(start, self.group_ends[group] - start):
                assert not self._device.in_use(piece.data_ptr(), piece.numel()), (
                    "what is being copied from is overwritten"
                )
                piece[:1] = 1
            on_group(group)


class TrackedMemory(CudaModelMemory):
    """Reports to the stand-in what the copies touch."""

    device: Device

    @property
    def group_ends(self) -> Sequence[int]:
        """Where the layer groups of the weights end, in bytes."""
        return self._filler.group_ends

    def _copy(self, source: WeightBuffer, group: int) -> None:
        start = self.group_ends[group - 1] if group else 0
        size = self.group_ends[group] - start
        stream: Any = self._copy_stream
        host = [(piece.data_ptr(), piece.numel()) for piece in source.pieces(start, size)]
        self.device.launch(stream, writes=[(self._weights.bytes_view.data_ptr() + start, size)], host=host)
        super()._copy(source, group)


@dataclass
class Model:
    """As the engine holds one. `kv`: place → slab."""

    name: str
    memory: TrackedMemory
    graphs: ModelGraphs
    slabs: list[int] | None = None
    kv: dict[int, int] = field(default_factory=dict)
    chunks: set[int] = field(default_factory=set)


class Engine:
    """Does to the memory what the engine's thread does, in any order that it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.rng = random.Random(seed)
        self.device = Device(seed)
        self.captures = TorchGraphs()
        self.captures.install(monkeypatch)
        self.device.install(monkeypatch)
        self.copy: Any = self.device.stream()
        self.kv_copy: Any = self.device.stream()
        compute: Any = self.device.compute
        self.memory = CudaMemory(torch.device("cpu"), SLAB, SLABS, compute)
        self.driver = self.device.drivers[-1]
        self.arena = HostTier(torch.zeros(12 * SLAB, dtype=torch.uint8), SLAB, ArenaIndex(""))
        self.pool = SlabPool(SLABS)
        self.graphs = GraphPool(torch.device("cpu"), enabled=True)
        self.models: dict[str, Model] = {}
        self.blank_passes = 0
        self.saved = 0
        self.pace = 4

    def load(self) -> None:
        name = f"model {self.rng.randrange(4)}"
        if name in self.models:
            self.unload(name)
        size = random.Random(name).randrange(SLAB // 2, 6 * SLAB)  # the same files each time
        weights = self.memory.reserve(-(-size // SLAB))
        try:
            kv_range = self.memory.reserve(GEOMETRY.max_slabs)
        except CudaError:
            weights.close()
            raise
        memory = TrackedMemory(
            self.memory,
            self.copy,
            self.kv_copy,
            self.arena,
            weights,
            kv_range,
            GEOMETRY,
            Bytes(self.device, size, self.rng.randrange(1, 4)),
            name,
        )
        memory.device = self.device
        memory.stage(threading.Event())
        fails = self.rng.random() < 0.2

        def blank(bucket: Bucket) -> torch.Tensor:
            if fails:
                self.captures.void()
            self.blank_pass(memory)
            return torch.zeros(bucket.num_rows)

        graphs = ModelGraphs(name, self.graphs, lambda: None, blank, lambda: not memory.pending, BUCKETS)
        self.models[name] = Model(name, memory, graphs)

    def blank_pass(self, memory: TrackedMemory) -> None:
        """A step of no rows: reads the weights, and hands kernels addresses of KV that are not read."""
        self.blank_passes += 1
        self.pass_over(memory, {})

    def pass_over(self, memory: TrackedMemory, kv: dict[int, int]) -> None:
        weights, places = memory.weights_view.data_ptr(), memory.kv_view.data_ptr()
        # each layer's planes begin in the first slab of the range
        assert all(self.driver.knows(address) for address in (weights, places, places + SLAB - 1)), (
            "Triton would refuse the pointer"
        )
        start = 0
        for group, end in enumerate(memory.group_ends):
            memory.wait(group)
            if self.captures.capturing is None:
                self.device.launch(
                    self.device.compute,
                    reads=[(weights + start, end - start)],
                    writes=[(places + place * SLAB, SLAB) for place in kv],
                )
            start = end

    def swap_in(self, model: Model) -> None:
        if model.slabs is not None or (slabs := self.pool.lend(model.name, model.memory.weight_slabs)) is None:
            return
        model.slabs = slabs
        try:
            model.memory.swap_in(slabs)
        except CudaError:
            self.unload(model.name)

    def evict(self, model: Model) -> None:
        if model.slabs is not None:
            model.memory.evict()
            self.pool.release(model.name, model.slabs)
            model.slabs = None

    def step(self, model: Model) -> None:
        if model.slabs is None:
            return
        graph = use(model.graphs, self.rng.choice(BUCKETS))
        if graph is not None:
            # a replay goes to the addresses of its capture, whatever was mapped there then
            reads = [(model.memory.weights_view.data_ptr(), model.memory.weight_bytes)]
            self.device.launch(
                self.device.compute,
                reads=reads,
                writes=[(model.memory.kv_view.data_ptr() + place * SLAB, SLAB) for place in model.kv],
            )
        else:
            self.pass_over(model.memory, model.kv)

    def grow(self, model: Model) -> None:
        free = [place for place in range(GEOMETRY.max_slabs) if place not in model.kv]
        lent = self.pool.lend(model.name + "/kv", 1) if free else None
        if lent is not None:
            place = self.rng.choice(free)
            try:
                model.memory.map_kv(place, lent[0])
            except CudaError:
                self.pool.release(model.name + "/kv", lent)
            else:
                model.kv[place] = lent[0]

    def shrink(self, model: Model) -> None:
        if model.kv:
            place = self.rng.choice(sorted(model.kv))
            model.memory.unmap_kv(place)
            self.pool.release(model.name + "/kv", [model.kv.pop(place)])

    def save(self, model: Model) -> None:
        """Save a slab's blocks, and give the slab up."""
        if not model.kv:
            return
        place, chunk = self.rng.choice(sorted(model.kv)), self.rng.randrange(3)
        if chunk not in model.chunks:
            model.memory.host_kv.map(chunk)
            model.chunks.add(chunk)
        model.memory.host_kv.save(self.blocks(place, chunk))
        self.saved += 1
        model.memory.unmap_kv(place)
        self.pool.release(model.name + "/kv", [model.kv.pop(place)])

    def restore(self, model: Model) -> None:
        if model.kv and model.chunks:
            place, chunk = self.rng.choice(sorted(model.kv)), self.rng.choice(sorted(model.chunks))
            model.memory.host_kv.restore(self.blocks(place, chunk))

    def blocks(self, place: int, chunk: int) -> list[tuple[int, int]]:
        count, per_slab = self.rng.randint(1, 3), GEOMETRY.pages_per_slab
        first, second = self.rng.randrange(per_slab - count + 1), self.rng.randrange(per_slab - count + 1)
        return [(place * per_slab + first + i, chunk * per_slab + second + i) for i in range(count)]

    def drop_saved(self, model: Model) -> None:
        for chunk in model.chunks:
            model.memory.host_kv.unmap(chunk)
        model.chunks.clear()

    def unload(self, name: str) -> None:
        model = self.models.pop(name)
        self.drop_saved(model)
        while model.kv:
            self.shrink(model)
        self.evict(model)
        model.graphs.close()
        model.memory.close()

    def idle(self) -> bool:
        members = {name: model.graphs for name, model in self.models.items()}
        return capture_next(self.graphs, members) or self.memory.tidy()

    def turn(self) -> None:
        model = self.rng.choice(list(self.models.values()) or [None])
        on_model: dict[str, Callable[[Model], None]] = {
            "swap_in": self.swap_in,
            "evict": self.evict,
            "step": self.step,
            "grow": self.grow,
            "shrink": self.shrink,
            "unload": lambda model: self.unload(model.name),
            "drop_host": self.drop_host,
            "save": self.save,
            "restore": self.restore,
            "drop_saved": self.drop_saved,
        }
        actions = ("load", "idle", *on_model)
        action = self.rng.choices(actions, (2, 8, 4, 2, 8, 4, 3, 1, 1, 4, 2, 1))[0]
        brings_in = action in ("load", "swap_in", "grow")
        self.calls_left = self.rng.randrange(5)
        self.device.failing = self.fail if brings_in and self.rng.random() < 0.2 else lambda call: None
        try:
            if action == "load":
                self.load()
            elif action == "idle":
                self.idle()
            elif model is not None:
                on_model[action](model)
        except CudaError:
            if action != "load":  # a load that fails is one model's affair
                raise
        finally:
            self.device.failing = lambda call: None
        # at times the device is far behind
        self.pace = self.rng.choice((0, 0, 2, 8)) if self.rng.random() < 0.1 else self.pace
        for _ in range(self.pace):
            self.device.advance()
        self.check()

    def drop_host(self, model: Model) -> None:
        model.memory.drop_host()

    def fail(self, call: str) -> None:
        self.calls_left -= 1
        if self.calls_left == -1:
            raise CudaError(f"{call} failed")

    def check(self) -> None:
        self.pool.check()
        assert self.memory.ledger.num_mapped == SLABS - self.pool.free
        assert not self.captures.recording

    def close(self) -> None:
        for name in list(self.models):
            self.unload(name)
        while self.device.advance():
            pass
        assert self.arena.free_bytes() == self.arena.total_bytes
        self.memory.close()
        assert (self.driver.num_mapped, self.driver.num_reserved, self.driver.handles) == (0, 0, {})


@pytest.mark.parametrize("seed", range(8))
def test_random_lives_do_nothing_that_a_driver_forbids(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    engine = Engine(monkeypatch, seed)
    for _ in range(400):
        engine.turn()
    assert engine.blank_passes > 0
    assert engine.saved > 0
    engine.close()
