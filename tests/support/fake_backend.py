"""A deterministic Backend whose token depends on every token before it, read back through the page tables.

So a block that is shared wrongly, dropped too early or written twice shows as a wrong text. It checks each plan against the rules of
runtime.engine.interfaces and keeps what the mechanism would keep: mapped slabs, rows, weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
import numpy as np
import numpy.typing as npt

from common.model_key import Quantization
from runtime.engine.grammar.interfaces import TokenMasks, mask_words
from runtime.engine.interfaces import (
    AdapterResult,
    Bucket,
    GraphCapture,
    GraphChoice,
    KvGeometry,
    LoadRequest,
    LoadResult,
    RowSetup,
    StepOutput,
    StepPlan,
)
from runtime.errors import LoadFailed
from runtime.ipc.messages import TokenLogprobs
from runtime.types import ModelFacts, Pooling
from tests.support.masks import unpack


def draw(
    model_id: str,
    history: Sequence[int],
    vocab: int,
    suppressed: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
) -> int:
    """The fake model's next token. Where `allowed` and `suppressed` leave nothing, `allowed` has precedence."""
    if allowed is not None:
        left = set(allowed) - set(suppressed) or set(allowed)
        suppressed = [token for token in range(vocab) if token not in left]
    digest = blake2b(repr((model_id, tuple(history))).encode(), digest_size=8).digest()
    token = int.from_bytes(digest, "little") % vocab
    while token in suppressed:
        token = (token + 1) % vocab
    return token


def voice(model_id: str, adapter: str) -> str:
    """The name that tokens are drawn by."""
    return f"{model_id}+{adapter}" if adapter else model_id


@dataclass
class FakeSpec:
    """Handed as Load.checkpoint.model_dir's stand-in: see FakeBackend.specs."""

    weight_slabs: int = 4
    vocab: int = 48
    eos: tuple[int, ...] = (0, 1)
    max_model_len: int = 200
    kv: KvGeometry = field(default_factory=lambda: KvGeometry(4, 4, 8, 2, 256, 64))
    load_polls: int = 2
    swap_polls: int = 3
    latency_polls: int = 2
    fails: str = ""


@dataclass
class FakeAdapterSpec:
    """`content` decides, with the base, what the adapter's sequences say."""

    base: str
    content: str
    size_bytes: int = 5000
    load_polls: int = 1
    swap_polls: int = 2
    fails: str = ""
    swap_fails: bool = False


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


class FakeMemory:
    def __init__(self, backend: "FakeBackend", model_id: str, spec: FakeSpec) -> None:
        self.weight_slabs = spec.weight_slabs
        self.weight_bytes = spec.weight_slabs * backend.slab_bytes
        self.kv = spec.kv
        self._backend = backend
        self._model_id = model_id
        self._spec = spec
        self._polls = 0
        self.resident = False
        self.closed = False
        self.kv_slab: dict[int, int] = {}
        self.cells: dict[tuple[int, int], tuple[int, int, str]] = {}  # (page, offset) → (position, token, adapter)
        self.host_kv = FakeHostKv(backend, self)
        if backend.host_free_bytes() >= self.weight_bytes:
            backend.host_weights[id(self)] = self.weight_bytes

    def swap_in(self, slabs: Sequence[int]) -> None:
        try:
            self._swap_in(slabs)
        except AssertionError as error:
            self._backend.broken_rules.append(f"{self._model_id}: swapped in wrongly: {error}")
            raise

    def _swap_in(self, slabs: Sequence[int]) -> None:
        assert not self.resident
        assert len(slabs) == self.weight_slabs
        assert not self.closed
        if self._backend.broken_swap_ins.pop(self._model_id, None):
            raise OSError("no such file")
        for slab in slabs:
            self._backend.map(slab, (self._model_id, "weights"))
        self._slabs = list(slabs)
        self.resident = True
        self._polls = 0

    def swap_in_done(self) -> bool:
        self._polls += 1
        return self._polls > self._spec.swap_polls

    def evict(self) -> None:
        if self.resident:
            for slab in self._slabs:
                self._backend.unmap(slab, (self._model_id, "weights"))
        self.resident = False

    def map_kv(self, index: int, slab: int) -> None:
        assert 0 <= index < self.kv.max_slabs
        assert index not in self.kv_slab
        self._backend.map(slab, (self._model_id, "kv"))
        self.kv_slab[index] = slab

    def unmap_kv(self, index: int) -> None:
        self._backend.unmap(self.kv_slab.pop(index), (self._model_id, "kv"))
        self.cells = {cell: value for cell, value in self.cells.items() if cell[0] // self.kv.pages_per_slab != index}

    def host_bytes(self) -> int:
        return self._backend.host_weights.get(id(self), 0)

    def drop_host(self) -> None:
        del self._backend.host_weights[id(self)]

    def close(self) -> None:
        self._backend.host_weights.pop(id(self), None)
        assert not self.resident
        assert not self.kv_slab
        assert not self.host_kv.chunks
        assert not self.closed
        self.closed = True


class FakeHostKv:
    """Implements interfaces.HostKvMemory: the cells of blocks that were saved, until their chunk goes."""

    def __init__(self, backend: "FakeBackend", memory: FakeMemory) -> None:
        self._backend = backend
        self._memory = memory
        self.chunks: set[int] = set()
        self.cells: dict[tuple[int, int], tuple[int, int, str]] = {}  # (host page, offset) → as in a page
        self.saved = 0
        self.restored = 0

    def map(self, index: int) -> None:
        assert index not in self.chunks
        assert self._backend.host_kv_used + self._backend.slab_bytes <= self._backend.host_kv_bytes
        self._backend.host_kv_used += self._backend.slab_bytes
        self.chunks.add(index)

    def unmap(self, index: int) -> None:
        self.chunks.remove(index)
        self._backend.host_kv_used -= self._backend.slab_bytes
        per_chunk = self._memory.kv.pages_per_slab
        self.cells = {cell: value for cell, value in self.cells.items() if cell[0] // per_chunk != index}

    def save(self, blocks: Sequence[tuple[int, int]]) -> None:
        for page, host_page in blocks:
            self._check(page, host_page)
            for offset in range(self._memory.kv.block_tokens):
                self.cells[host_page, offset] = self._memory.cells[page, offset]
        self.saved += len(blocks)

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None:
        for page, host_page in blocks:
            self._check(page, host_page)
            for offset in range(self._memory.kv.block_tokens):
                self._memory.cells[page, offset] = self.cells[host_page, offset]
        self.restored += len(blocks)

    def _check(self, page: int, host_page: int) -> None:
        assert page // self._memory.kv.pages_per_slab in self._memory.kv_slab, f"page {page} is not mapped"
        assert host_page // self._memory.kv.pages_per_slab in self.chunks, f"host page {host_page} has no chunk"


@dataclass
class FakeRow:
    setup: RowSetup
    table: dict[int, int] = field(default_factory=dict)
    last: int | None = None
    adapter: str = ""  # in the step that runs
    may_be_masked: bool = False  # every draw so far had a mask


class FakeLaunched:
    def __init__(self, runner: "FakeRunner", result: StepOutput | None, polls: int) -> None:
        self._runner = runner
        runner.flying += 1
        self._result = result
        self._polls = polls

    def ready(self) -> bool:
        self._polls -= 1
        return self._polls < 0

    def collect(self) -> StepOutput:
        self._runner.flying -= 1
        if self._result is None:
            raise RuntimeError("the fake device stumbled")
        return self._result


class FakeRunner:
    def __init__(
        self, backend: "FakeBackend", facts: ModelFacts, spec: FakeSpec, memory: FakeMemory, bank: FakeBank
    ) -> None:
        self.facts = facts
        self._bank = bank
        self.adapters_expected = False
        self._backend = backend
        self._spec = spec
        self._memory = memory
        self.rows: dict[int, FakeRow] = {}
        self.closed = False
        self.flying = 0
        self.undrawn: StepPlan | None = None  # a forward pass was launched, its draws were not

    def open_row(self, setup: RowSetup) -> None:
        assert setup.row not in self._backend.open_rows, "the row is taken"
        assert 0 <= setup.row < self._backend.max_rows
        assert len(setup.prompt) == setup.prompt_len
        self.rows[setup.row] = FakeRow(setup, may_be_masked=setup.masked)
        self._backend.open_rows.add(setup.row)

    def expect_adapters(self) -> None:
        self.adapters_expected = True

    def close_row(self, row: int) -> None:
        # a row whose step broke at its launch may never have been opened
        if self.rows.pop(row, None) is not None:
            self._backend.open_rows.remove(row)

    def close(self) -> None:
        assert not self.rows
        assert not self.flying, "closed under a step in flight"
        assert not self._memory.closed
        self.closed = True

    def choose_graph(self, plan: StepPlan) -> GraphChoice:
        return GraphChoice()

    def has_graph(self, bucket: Bucket) -> bool:
        return False

    def capture(self, bucket: Bucket, *, record: bool) -> None:
        self._backend.captured.append(GraphCapture(self.facts.model_id, bucket, record))

    def launch(self, plan: StepPlan, padded_to: Bucket | None = None) -> FakeLaunched:
        return self._checked(plan, None)

    def launch_forward(self, plan: StepPlan, padded_to: Bucket | None = None) -> None:
        assert plan.masked
        self.undrawn = plan

    def mask_lines(self, count: int) -> TokenMasks:
        return np.full((count, mask_words(self.facts.vocab_size)), -1, np.int32)

    def launch_draws(self, masks: TokenMasks) -> FakeLaunched:
        plan, self.undrawn = self.undrawn, None
        assert plan is not None
        return self._checked(plan, masks)

    def _checked(self, plan: StepPlan, masks: TokenMasks | None) -> FakeLaunched:
        try:
            assert self._backend.undrawn_plans() == 0, "a step between a forward pass and its draws"
            assert len(plan.masked) == (0 if masks is None else len(masks)), "a mask for each masked row"
            assert masks is None or masks.flags.writeable, "a runner may change the masks"
            return self._launch(plan, {} if masks is None else dict(zip(plan.masked, masks, strict=True)))
        except AssertionError as error:
            # the engine takes it for a fault of the device, and lives on
            self._backend.broken_rules.append(f"{self.facts.model_id}: {error}")
            raise

    def _launch(self, plan: StepPlan, masks: dict[int, TokenMasks]) -> FakeLaunched:
        assert self._memory.resident, "launched without weights"
        fault = self._backend.faults.pop(self.facts.model_id, "")
        if fault == "launch":
            raise RuntimeError("the fake device refuses")
        self._check(plan)
        for at_row, index, page in plan.new_blocks:
            assert page // self._memory.kv.pages_per_slab in self._memory.kv_slab, f"page {page} is not mapped"
            assert (page % self._memory.kv.pages_per_slab) % self._memory.kv.pages_per_block == 0
            self.rows[at_row].table[index] = page
        holders: dict[int, list[tuple[int, int]]] = {}  # page → rows that have it, and where
        for slot, opened in self.rows.items():
            for index, page in opened.table.items():
                holders.setdefault(page, []).append((slot, index))
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        vectors: dict[int, bytes] = {}
        at = 0
        work = []
        for i, slot in enumerate(plan.rows):
            row = self.rows[slot]
            adapter = plan.adapters[i] if plan.adapters else -1
            row.adapter = self._bank.content(adapter) if adapter >= 0 else ""
            if plan.from_device[i]:
                assert row.last is not None, "nothing was drawn yet"
                ids = [row.last]
            else:
                ids = plan.tokens[at : at + plan.counts[i]]
                at += plan.counts[i]
            self._write(row, plan.starts[i], ids)
            self._check_alone(plan, i, holders)
            work.append((i, slot, row, ids))
        assert at == len(plan.tokens)
        for i, slot, row, ids in work:
            end = plan.starts[i] + len(ids)
            if slot in plan.prompt_logprobs:
                history = self._read(row, end)
                positions = range(plan.starts[i], end)
                prompt_logprobs[slot] = [
                    self.logprob(history[: position + 1]) if position else None for position in positions
                ]
            for pooled_row, first, last, reduction in plan.pooled:
                if pooled_row == slot:
                    assert plan.starts[i] <= first <= last <= end, "pooled tokens that the step does not compute"
                    states = [self.hidden(self._read(row, position + 1)) for position in range(first, last)]
                    hidden = np.array(states, np.float32).reshape(-1, 2)
                    weights = np.arange(first, last)[:, None] + 1 if reduction == "weighted" else 1
                    reduced = hidden.max(0) if reduction == "max" else (weights * hidden).sum(0)
                    vectors[slot] = vectors.get(slot, b"") + reduced.astype(np.float32).tobytes()
            for known in range(end - plan.samples[i] + 1, end + 1):
                history = self._read(row, known)
                drawn = known - row.setup.prompt_len
                suppressed = row.setup.suppressed if drawn < row.setup.min_tokens else ()
                assert row.may_be_masked or slot not in masks, "masked without being set up for it, or again"
                row.may_be_masked = slot in masks
                allowed = unpack(masks[slot], self._spec.vocab) if slot in masks else None
                token = draw(voice(self.facts.model_id, row.adapter), history, self._spec.vocab, suppressed, allowed)
                row.last = token
                tokens.append(token)
                wanted = row.setup.logprobs.generated is not None
                logprobs.append(self.logprob([*history, token]) if wanted else None)
        self._backend.steps += 1
        self._backend.largest_step = max(self._backend.largest_step, plan.num_tokens)
        if fault == "collect":
            self._backend.results.append(None)
            return FakeLaunched(self, None, self._spec.latency_polls)
        result = StepOutput(
            tokens,
            100.0 + self._backend.token_us * plan.num_tokens + self._backend.adapter_us * len({*plan.adapters} - {-1}),
            logprobs if any(logprobs) else None,
            prompt_logprobs or None,
            vectors or None,
        )
        self._backend.results.append(result)
        return FakeLaunched(self, result, self._spec.latency_polls)

    @staticmethod
    def hidden(history: Sequence[int]) -> npt.NDArray[np.float32]:
        """The last token's hidden state. Sums of a test's prompts are exact."""
        return np.array([draw("hidden", history, 1000), len(history)], np.float32)

    @classmethod
    def vectors(cls, prompt: Sequence[int], pooling: Sequence[Pooling]) -> npt.NDArray[np.float32]:
        """The vectors of a whole prompt, end to end."""
        states = np.stack([cls.hidden(prompt[: end + 1]) for end in range(len(prompt))])
        weights = np.arange(1, len(states) + 1)[:, None]
        found: dict[Pooling, npt.NDArray[np.float32]] = {
            Pooling.FIRST: states[0],
            Pooling.MAX: states.max(0),
            Pooling.MEAN: states.mean(0),
            Pooling.MEAN_SQRT_LEN: states.sum(0) / len(states) ** 0.5,
            Pooling.WEIGHTED_MEAN: (weights * states).sum(0) / weights.sum(),
            Pooling.LAST: states[-1],
        }
        return np.concatenate([found[mode] for mode in pooling]).astype(np.float32)

    @staticmethod
    def logprob(history: Sequence[int]) -> TokenLogprobs:
        return TokenLogprobs(-float(draw("logprob", history, 1000)) / 100.0, 1)

    def _check(self, plan: StepPlan) -> None:
        count = len(plan.rows)
        assert count
        assert count == len(plan.starts) == len(plan.counts) == len(plan.from_device) == len(plan.samples)
        assert len(set(plan.rows)) == count, "a row twice"
        assert len(plan.adapters) in (0, count)
        assert not plan.adapters or max(plan.adapters) >= 0, "adapters without an adapter"
        assert all(row in self.rows for row in plan.rows), "a row that is not open"
        assert all(c >= max(1, s) for c, s in zip(plan.counts, plan.samples, strict=True))
        assert sum(plan.samples) <= self._backend.max_rows, "more draws than rows"
        assert sorted(plan.from_device, reverse=True) == plan.from_device, "decode rows come first"
        assert all(c == 1 and s == 1 for c, s, d in zip(plan.counts, plan.samples, plan.from_device, strict=True) if d)
        assert plan.num_tokens <= max(self._backend.max_batch_tokens, sum(plan.from_device))

    def _check_alone(self, plan: StepPlan, i: int, holders: dict[int, list[tuple[int, int]]]) -> None:
        """Nobody else has the pages that the plan's i-th row writes, but rows after it that read them (a layer writes before any row reads, unless all
        have one token), and rows that this plan gave them to read later."""
        size, slot = self._memory.kv.block_tokens, plan.rows[i]
        for index in range(plan.starts[i] // size, (plan.starts[i] + plan.counts[i] - 1) // size + 1):
            page = self.rows[slot].table[index]
            for other, at in holders[page]:
                if other == slot:
                    continue
                if other in plan.rows:
                    reads = (
                        plan.rows.index(other) > i
                        and plan.starts[plan.rows.index(other)] >= (at + 1) * size
                        and plan.counts[i] > 1
                    )
                else:
                    reads = (other, at, page) in plan.new_blocks
                assert reads, f"page {page} is written by row {slot} while row {other} holds it"

    def _write(self, row: FakeRow, start: int, ids: Sequence[int]) -> None:
        size = self._memory.kv.block_tokens
        for position, token in enumerate(ids, start):
            assert position < self.facts.max_model_len, f"position {position} is past the context"
            page = row.table[position // size]
            assert page // self._memory.kv.pages_per_slab in self._memory.kv_slab, f"page {page} is not mapped"
            self._memory.cells[page, position % size] = (position, token, row.adapter)

    def _read(self, row: FakeRow, end: int) -> list[int]:
        size = self._memory.kv.block_tokens
        history = []
        for position in range(end):
            at, token, adapter = self._memory.cells[row.table[position // size], position % size]
            assert at == position, f"position {position} reads what was written for {at}"
            assert adapter == row.adapter, f"adapter {row.adapter!r} reads what {adapter!r} wrote"
            history.append(token)
        return history


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
