"""A deterministic Backend whose token depends on every token before it, read back through the page tables.

So a block that is shared wrongly, dropped too early or written twice shows as a wrong text. It checks each plan against the rules of
runtime.engine.interfaces and keeps what the mechanism would keep: mapped slabs, rows, weights."""

from collections.abc import Callable, Sequence

from common.model_key import Quantization
from runtime.engine.interfaces import (
    GraphCapture,
    LoadRequest,
    LoadResult,
    StepOutput,
)
from runtime.errors import LoadFailed
from runtime.types import ModelFacts
from tests.support.fake_adapters import FakeAdapterJob, FakeAdapterMemory, FakeBank
from tests.support.fake_memory import FakeMemory
from tests.support.fake_runner import FakeRunner
from tests.support.fake_specs import FakeAdapterSpec, FakeSpec, voice


class FakeJob:
    def __init__(self, backend: "FakeBackend", request: LoadRequest, spec: FakeSpec) -> None:
        self._backend, self._request, self._spec = backend, request, spec
        self._polls = spec.load_polls
        self.cancelled = False

    def done(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def result(self) -> LoadResult:
        model_id, spec = self._request.model_id, self._spec
        if spec.fails:
            raise LoadFailed(f"model {model_id}: {spec.fails}")
        longest = min(spec.max_model_len, self._request.max_model_len or spec.max_model_len)
        facts = ModelFacts(
            model_id,
            "FakeForCausalLM",
            "fake",
            "float32",
            Quantization.NONE,
            spec.weight_slabs * self._backend.slab_bytes,
            spec.kv.bytes_per_token,
            longest,
            spec.vocab,
            1,
            spec.eos,
        )
        memory = FakeMemory(self._backend, model_id, spec)
        self._backend.memories.append(memory)
        bank = FakeBank(self._backend, model_id)
        runner = FakeRunner(self._backend, facts, spec, memory, bank)
        self._backend.runners.append(runner)
        self._backend.banks.append(bank)
        return LoadResult(runner, memory, bank)

    def cancel(self) -> None:
        self.cancelled = True


class FakeBackend:
    """`specs` names the models that can be loaded. `faults[model]` = "launch" or "collect" breaks its next step."""

    device = "fake"
    device_name = "Fake"
    slab_bytes = 4096

    def __init__(
        self,
        specs: dict[str, FakeSpec],
        total_slabs: int = 32,
        max_rows: int = 16,
        max_batch_tokens: int = 64,
        host_kv_slabs: int = 0,
        host_slabs: int = 0,
        committed: int | None = None,
    ) -> None:
        self.specs = specs
        self.host_kv_bytes = host_kv_slabs * self.slab_bytes
        self.host_kv_used = 0
        self.host_total_bytes = host_slabs * self.slab_bytes
        self.host_weights: dict[int, int] = {}  # id of a FakeMemory → bytes of its host copy
        self.total_slabs = total_slabs
        self.committed = set(range(total_slabs if committed is None else committed))
        self.obtainable_slabs = total_slabs  # what the driver would give in all
        self.max_rows = max_rows
        self.max_batch_tokens = max_batch_tokens
        self.faults: dict[str, str] = {}
        self.broken_rules: list[str] = []  # what a plan did that it may not
        self.broken_swap_ins: dict[str, bool] = {}
        self.open_rows: set[int] = set()
        self.memories: list[FakeMemory] = []
        self.runners: list[FakeRunner] = []
        self.adapters: dict[str, FakeAdapterSpec] = {}
        self.adapter_slots = 4
        self.adapter_memories: list[FakeAdapterMemory] = []
        self.banks: list[FakeBank] = []
        self.captures: list[GraphCapture] = []  # due in idle turns
        self.captured: list[GraphCapture] = []
        self.lost = False
        self.steps = 0
        self.largest_step = 0
        self.token_us = 2.0
        self.adapter_us = 0.0  # of each different adapter of a step
        self.results: list[StepOutput | None] = []  # of every launch; None where the step broke
        self._mapped: dict[int, tuple[str, str]] = {}

    def map(self, slab: int, owner: tuple[str, str]) -> None:
        assert slab in self.committed, f"slab {slab} has no memory"
        assert slab not in self._mapped, f"slab {slab} is mapped already"
        self._mapped[slab] = owner

    def commit_slabs(self, slabs: Sequence[int]) -> None:
        if len(self.committed) + len(slabs) > self.obtainable_slabs:
            raise MemoryError(f"the device has {self.obtainable_slabs} slabs")
        assert self.committed.isdisjoint(slabs)
        self.committed |= set(slabs)

    def decommit_slabs(self, slabs: Sequence[int]) -> None:
        assert self._mapped.keys().isdisjoint(slabs)
        self.committed -= set(slabs)

    def unmap(self, slab: int, owner: tuple[str, str]) -> None:
        assert self._mapped.pop(slab) == owner

    def undrawn_plans(self) -> int:
        """Forward passes whose draws were not launched; at most one at any time."""
        return sum(runner.undrawn is not None for runner in self.runners)

    @property
    def mapped(self) -> int:
        return len(self._mapped)

    def snapshot(self) -> list[object]:
        """Everything that operations have changed, as plain values."""
        models = [
            (
                runner.facts.model_id,
                runner.closed,
                memory.closed,
                memory.resident,
                sorted(memory.kv_slab.items()),
                sorted(memory.cells.items()),
                sorted(memory.host_kv.chunks),
                sorted(memory.host_kv.cells.items()),
                sorted(
                    (slot, row.setup.prompt_len, list(row.setup.prompt), row.last) for slot, row in runner.rows.items()
                ),
                sorted((slot, sorted(row.table.items())) for slot, row in runner.rows.items()),
            )
            for runner, memory in zip(self.runners, self.memories, strict=True)
        ]
        return [models, sorted(self._mapped.items()), sorted(self.open_rows), self.steps]

    def host_free_bytes(self) -> int:
        used = sum(self.host_weights.values()) + self.host_kv_used
        assert not self.host_total_bytes or used <= self.host_total_bytes
        return max(0, self.host_total_bytes - used)

    def load(self, request: LoadRequest) -> FakeJob:
        return FakeJob(self, request, self.specs[request.model_id])

    def load_adapter(self, request: LoadRequest, base: LoadResult) -> FakeAdapterJob:
        return FakeAdapterJob(self, request.model_id, base)

    def voice_of(self, model_id: str) -> tuple[str, FakeSpec]:
        """Return the name that the tokens of a model or an adapter are drawn by, and its (base's) spec."""
        adapter = self.adapters.get(model_id)
        if adapter is None:
            return model_id, self.specs[model_id]
        return voice(adapter.base, adapter.content), self.specs[adapter.base]

    def synchronize(self) -> None: ...

    def settle(self) -> None:
        if self.lost:
            raise RuntimeError("the fake device is lost")

    def next_capture(self) -> GraphCapture | None:
        return self.captures.pop(0) if self.captures else None

    def idle(self, mark: Callable[[str], None]) -> bool:
        return False
