"""A device in virtual time for the engine's own scheduling and residency code: steps and copies take as long as bytes and operations say.

The device computes one step at a time. The link from the host carries one copy at a time, beside the steps. A step without a CUDA graph takes at least
as long as Python needs to launch it (bench/simulated_graphs.py).
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.checkpoints import Shape
from bench.limits import BF16_FLOP_PER_S, BODY_BYTES_PER_PARAMETER, COPY_BYTES_PER_S, HOST_TO_DEVICE_BYTES_PER_S
from bench.simulated_graphs import SimulatedGraphPool, SimulatedGraphs, python_s
from common.model_key import Quantization
from common.units import MIB
from runtime.engine.grammar.interfaces import TokenMasks
from runtime.engine.interfaces import (
    AdapterJob,
    Bucket,
    GraphCapture,
    GraphChoice,
    HostKvMemory,
    KvGeometry,
    LoadRequest,
    LoadResult,
    RowSetup,
    StepOutput,
    StepPlan,
)
from runtime.types import ModelFacts

SLAB_BYTES = 64 * MIB
_BLOCK_TOKENS = 16
_STEP_SHARE = 0.85  # of the floor that measured steps reach (docs/benchmarks/engine.md)
_LAUNCH_S = 3e-4
_DISK_BYTES_PER_S = 6e9
_MAX_MODEL_LEN = 4096


@dataclass(slots=True)
class VirtualClock:
    """Seconds that pass only when `advance` is called, and the times at which something happens by itself."""

    now_s: float = 0.0
    _due: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def expect(self, at_s: float) -> None:
        heapq.heappush(self._due, at_s)

    def advance(self, to_s: float) -> None:
        self.now_s = max(self.now_s, to_s)

    def next_due_s(self) -> float:
        """Return the next expected time after now, or infinity."""
        while self._due and self._due[0] <= self.now_s:
            heapq.heappop(self._due)
        return self._due[0] if self._due else float("inf")


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """A model's shape and weight format."""

    shape: Shape
    format: str

    @property
    def kind(self) -> str:
        return f"{self.shape.name}/{self.format}"

    @property
    def weight_bytes(self) -> int:
        """The image that a swap-in copies: what a step reads, and the embeddings unless they are the output projection."""
        embeddings = 0 if self.shape.tied else 2 * self.shape.vocab * self.shape.hidden
        return int(self.shape.step_bytes(BODY_BYTES_PER_PARAMETER[self.format])) + embeddings

    def step_s(self, num_tokens: int, kv_tokens: int) -> float:
        """Return the time of a step of `num_tokens` tokens whose rows have `kv_tokens` of context together."""
        weight_bytes = self.shape.step_bytes(BODY_BYTES_PER_PARAMETER[self.format])
        num_bytes = weight_bytes + kv_tokens * self.shape.kv_bytes_per_token
        operations = 2.0 * num_tokens * self.shape.body_parameters
        return max(num_bytes / COPY_BYTES_PER_S, operations / BF16_FLOP_PER_S) / _STEP_SHARE + _LAUNCH_S


class SimulatedDevice:
    """Implements interfaces.Backend.

    Args:
        models: by model id.
        overlap: whether copies run beside steps; if not, each waits for the other.
    """

    def __init__(
        self,
        models: Mapping[str, SimulatedModel],
        clock: VirtualClock,
        device_bytes: int,
        host_bytes: int,
        max_rows: int = 512,
        *,
        overlap: bool = True,
        slab_bytes: int = SLAB_BYTES,
    ) -> None:
        self.device, self.device_name = "simulated", "simulated H200"
        self.slab_bytes = slab_bytes
        self.total_slabs = device_bytes // slab_bytes
        self.host_total_bytes = host_bytes
        self.host_kv_bytes = 0
        self.max_rows = max_rows
        self.clock = clock
        self.overlap = overlap
        self.copied_bytes = 0
        self.graphs = SimulatedGraphPool()
        self.host_used: dict[str, int] = {}
        self._models = models
        self._steps_end_s = 0.0
        self._copies_end_s = 0.0

    def commit_slabs(self, slabs: Sequence[int]) -> None:
        raise NotImplementedError("a simulated engine has its device to itself")

    def decommit_slabs(self, slabs: Sequence[int]) -> None:
        raise NotImplementedError("a simulated engine has its device to itself")

    def host_free_bytes(self) -> int:
        return self.host_total_bytes - sum(self.host_used.values())

    def load(self, request: LoadRequest) -> "_Loaded":
        return _Loaded(self, request.model_id, self._models[request.model_id])

    def load_adapter(self, request: LoadRequest, base: LoadResult) -> AdapterJob:
        raise NotImplementedError("the traces have no adapters")

    def synchronize(self) -> None:
        self.clock.advance(self._steps_end_s)

    def settle(self) -> None:
        """Wait for nothing: a capture has ended when it returns."""

    def next_capture(self) -> GraphCapture | None:
        return self.graphs.next_capture()

    def idle(self, mark: Callable[[str], None]) -> bool:
        del mark
        return False

    def keep_on_host(self, model_id: str, size_bytes: int) -> None:
        """Copy weights to the host tier if there is room."""
        if self.host_free_bytes() >= size_bytes:
            self.host_used[model_id] = size_bytes

    def wait(self, seconds: float) -> None:
        """Let the engine's thread work for so long."""
        self.clock.advance(self.clock.now_s + seconds)

    def run_step(self, seconds: float, weights_s: float) -> tuple[float, float]:
        """Queue a step that needs weights which arrive at `weights_s`. Returns when it begins, as the device measures it, and when it ends."""
        begin = max(self.clock.now_s, self._steps_end_s)
        self._steps_end_s = max(begin, weights_s, 0.0 if self.overlap else self._copies_end_s) + seconds
        self.clock.expect(self._steps_end_s)
        return begin, self._steps_end_s

    def copy(self, num_bytes: int, from_disk: bool) -> float:
        """Queue a copy of weights to the device. Returns when it ends."""
        begin = max(self.clock.now_s, self._copies_end_s, 0.0 if self.overlap else self._steps_end_s)
        self._copies_end_s = begin + num_bytes / (_DISK_BYTES_PER_S if from_disk else HOST_TO_DEVICE_BYTES_PER_S)
        self.copied_bytes += num_bytes
        self.clock.expect(self._copies_end_s)
        return self._copies_end_s


class _Memory:
    """Implements interfaces.ModelMemory."""

    def __init__(self, device: SimulatedDevice, model_id: str, model: SimulatedModel) -> None:
        self.weight_bytes = model.weight_bytes
        self.weight_slabs = -(-self.weight_bytes // device.slab_bytes)
        block_bytes = _BLOCK_TOKENS * model.shape.kv_bytes_per_token
        blocks = device.slab_bytes // block_bytes
        self.kv = KvGeometry(_BLOCK_TOKENS, blocks, blocks, 1, model.shape.kv_bytes_per_token, device.total_slabs)
        self.ready_s = 0.0
        self._device = device
        self._model_id = model_id
        device.keep_on_host(model_id, self.weight_bytes)

    def swap_in(self, slabs: Sequence[int]) -> None:
        del slabs
        self.ready_s = self._device.copy(self.weight_bytes, from_disk=not self.host_bytes())
        if not self.host_bytes():
            self._device.keep_on_host(self._model_id, self.weight_bytes)

    def swap_in_done(self) -> bool:
        return self._device.clock.now_s >= self.ready_s

    def evict(self) -> None:
        """Take no time: nothing is copied."""

    def map_kv(self, index: int, slab: int) -> None:
        """Take no time."""

    def unmap_kv(self, index: int) -> None:
        """Take no time."""

    @property
    def host_kv(self) -> HostKvMemory:
        raise NotImplementedError("the simulated host tier keeps no KV")

    def host_bytes(self) -> int:
        return self._device.host_used.get(self._model_id, 0)

    def drop_host(self) -> None:
        self._device.host_used.pop(self._model_id, None)

    def close(self) -> None:
        self.drop_host()


class _Step:
    """Implements interfaces.Launched. Waiting for it moves the clock."""

    def __init__(self, clock: VirtualClock, end_s: float, output: StepOutput) -> None:
        self._clock = clock
        self._end_s = end_s
        self._output = output

    def ready(self) -> bool:
        return self._clock.now_s >= self._end_s

    def collect(self) -> StepOutput:
        self._clock.advance(self._end_s)
        return self._output


class _Runner:
    """Implements interfaces.Runner. Every token is 7."""

    def __init__(self, device: SimulatedDevice, model_id: str, model: SimulatedModel, memory: _Memory) -> None:
        self.facts = ModelFacts(
            model_id, "simulated", "fused", "bfloat16", Quantization.NONE, memory.weight_bytes,
            model.shape.kv_bytes_per_token, _MAX_MODEL_LEN, model.shape.vocab, model.shape.body_parameters,
        )  # fmt: skip
        self._device = device
        self._model = model
        self._memory = memory
        self._graphs = SimulatedGraphs(
            model_id, model.shape, device.graphs, device.max_rows, device.wait, memory.swap_in_done
        )

    def expect_adapters(self) -> None:
        """Prepare nothing: the traces have no adapters."""

    def open_row(self, setup: RowSetup) -> None:
        """Keep nothing."""

    def close_row(self, row: int) -> None:
        """Keep nothing."""

    def choose_graph(self, plan: StepPlan) -> GraphChoice:
        return self._graphs.choose(plan)

    def has_graph(self, bucket: Bucket) -> bool:
        return self._graphs.has(bucket)

    def is_prepared(self) -> bool:
        return True

    def capture(self, bucket: Bucket, *, record: bool) -> None:
        self._graphs.capture(bucket, record=record)

    def launch(self, plan: StepPlan, padded_to: Bucket | None = None) -> _Step:
        context = sum(plan.starts) + plan.num_tokens
        seconds = self._model.step_s(plan.num_tokens if padded_to is None else padded_to.num_tokens, context)
        if padded_to is None:
            # The device runs each layer while Python launches the next, and waits where Python takes longer.
            seconds = max(seconds, python_s(self._model.shape))
        begin_s, end_s = self._device.run_step(seconds, self._memory.ready_s)
        if padded_to is None:
            self._device.wait(python_s(self._model.shape))
        return _Step(self._device.clock, end_s, StepOutput([7] * sum(plan.samples), (end_s - begin_s) * 1e6))

    def launch_forward(self, plan: StepPlan, padded_to: Bucket | None = None) -> None:
        raise NotImplementedError("simulated requests have no grammar")

    def mask_lines(self, count: int) -> TokenMasks:
        raise NotImplementedError("simulated requests have no grammar")

    def launch_draws(self, masks: TokenMasks) -> _Step:
        raise NotImplementedError("simulated requests have no grammar")

    def close(self) -> None:
        """Keep nothing."""


class _Loaded:
    """Implements interfaces.LoadJob: a load that is over at once."""

    def __init__(self, device: SimulatedDevice, model_id: str, model: SimulatedModel) -> None:
        memory = _Memory(device, model_id, model)
        self._result = LoadResult(_Runner(device, model_id, model, memory), memory)

    def done(self) -> bool:
        return True

    def result(self) -> LoadResult:
        return self._result

    def cancel(self) -> None:
        """Do nothing: the load is over."""
