"""A driver of one ModelRunner for tests: makes step plans as a scheduler might at its most perverse, and keeps KV pages as a block pool might.

Pages are handed out in random order from slabs whose page unit is not a block; prompts are cut at random, batches composed at random, rows preempted
at random. Everything is drawn from one seed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from common.model_key import Quantization
from runtime.config.schema import EngineConfig
from runtime.engine.interfaces import KvGeometry, RowSetup, Runner, StepOutput, StepPlan
from runtime.engine.model.run.attention import IMPLEMENTATION, register
from runtime.engine.model.run.device_state import DeviceState
from runtime.engine.model.run.kv_geometry import attention_geometry, kv_geometry, kv_planes
from runtime.engine.model.run.runner import ModelRunner
from runtime.engine.model.run.step import BuiltModel, StepContext
from runtime.ipc.messages import TokenLogprobs
from runtime.types import LogprobParams, ModelFacts, SamplingParams
from tests.support.graphs import launch, launch_forward
from tests.support.masks import pack

BLOCK_TOKENS = 16


class HookedForward:
    """transformers' own forward pass through the attention hook."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, step: StepContext
    ) -> torch.Tensor:
        out = self._model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logits_at,
            step=step,
        )
        logits: torch.Tensor = out.logits[0]
        return logits


@dataclass(frozen=True)
class Pages:
    """A model's page ids and how many blocks it may have."""

    ids: list[int]


def hooked(
    model: PreTrainedModel, *, num_slabs: int = 24, device: str = "cpu", kv_dtype: torch.dtype | None = None
) -> tuple[BuiltModel, Pages]:
    """A BuiltModel over `model` (made with its own attention, switched to the hook here) with KV memory of its own."""
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    shape = attention_geometry(model)
    dtype = kv_dtype or model.dtype
    block_bytes = 2 * shape.num_layers * BLOCK_TOKENS * shape.token_stride * dtype.itemsize
    slab_bytes = 3 * block_bytes + 512  # three blocks and a gap: the page unit becomes a part of a block
    kv = kv_geometry("tiny", shape, BLOCK_TOKENS, dtype.itemsize, slab_bytes, num_slabs)
    memory = torch.zeros(num_slabs * slab_bytes, dtype=torch.uint8, device=device)
    planes = kv_planes(memory, kv, shape, dtype)
    built = BuiltModel(
        HookedForward(model),
        planes,
        BLOCK_TOKENS,
        model.config.get_text_config().vocab_size,
        512,
        torch.device(device),
        model.dtype,
        dtype,
        (),
        "unfused: test",
        shape.token_stride,
    )
    return built, pages_of(kv, num_slabs)


def pages_of(kv: KvGeometry, num_slabs: int) -> Pages:
    """All page ids of the first slabs."""
    ids = [
        slab * kv.pages_per_slab + block * kv.pages_per_block
        for slab in range(num_slabs)
        for block in range(kv.blocks_per_slab)
    ]
    return Pages(ids)


def facts_of(built: BuiltModel, model_id: str = "tiny") -> ModelFacts:
    return ModelFacts(
        model_id,
        "Tiny",
        built.path,
        str(built.dtype),
        Quantization.NONE,
        0,
        0,
        built.max_model_len,
        built.vocab_size,
        0,
    )


@dataclass
class Ask:
    """One sequence to generate."""

    prompt: list[int]
    max_new: int
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    logprobs: LogprobParams = field(default_factory=LogprobParams)
    min_tokens: int = 0
    suppressed: tuple[int, ...] = ()
    allowed: Callable[[list[int]], list[int]] | None = None  # from the output so far; makes it a masked row


@dataclass
class _Row:
    ask: Ask
    said: list[int] = field(default_factory=list)
    done: int = 0  # tokens whose KV is written
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    on_device: bool = False  # its last token was drawn in this slot
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.ask.prompt + self.said

    @property
    def finished(self) -> bool:
        return len(self.said) >= self.ask.max_new


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[TokenLogprobs | None]


@dataclass
class Work:
    """Asks under way."""

    rows: list[_Row]

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    def answers(self) -> list[Answer]:
        return [Answer(row.said, row.logprobs, row.prompt_logprobs) for row in self.rows]


class RunnerDriver:
    """Runs asks on a runner to their ends. `chaos` False: all rows in every step, whole prompts, no preemption."""

    def __init__(self, runner: Runner, pages: Pages, *, seed: int, chaos: bool, max_rows: int, max_tokens: int) -> None:
        self.runner = runner
        self._max_tokens = max_tokens
        self.plans: list[StepPlan] = []
        self.preemptions = 0
        self._rng = random.Random(seed)
        self._chaos = chaos
        self._free_pages = list(pages.ids)
        self._rng.shuffle(self._free_pages)
        self._free_slots = list(range(max_rows))
        self._rng.shuffle(self._free_slots)

    def run(self, asks: list[Ask]) -> list[Answer]:
        work = self.start(asks)
        while not work.finished:
            self.turn(work)
        return work.answers()

    def start(self, asks: list[Ask]) -> "Work":
        return Work([_Row(ask) for ask in asks])

    def turn(self, work: "Work", *, close_all: bool = False) -> None:
        """One step. `close_all`: leave no row open after it, so that another model may have the slots."""
        running = [row for row in work.rows if not row.finished]
        if running:
            self._step(running)
        for row in work.rows:
            if row.slot >= 0 and (close_all or row.finished or (self._chaos and self._preempts(row))):
                self._close(row)

    def _preempts(self, row: _Row) -> bool:
        # what a prompt's earlier chunks brought would come twice
        return row.ask.logprobs.prompt is None and self._rng.random() < 0.04

    def _open(self, row: _Row) -> None:
        row.slot = self._free_slots.pop()
        ask = row.ask
        self.runner.open_row(
            RowSetup(
                row.slot,
                ask.sampling,
                ask.logprobs,
                ask.prompt,
                len(ask.prompt),
                ask.min_tokens,
                ask.suppressed,
                ask.allowed is not None,
            )
        )

    def _close(self, row: _Row) -> None:
        self.preemptions += not row.finished
        self.runner.close_row(row.slot)
        self._free_slots.insert(0, row.slot)
        self._free_pages = row.pages + self._free_pages
        self._rng.shuffle(self._free_pages)
        row.slot, row.done, row.pages, row.on_device = -1, 0, [], False

    def _step(self, running: list[_Row]) -> None:
        rng = self._rng
        taken = [row for row in running if not self._chaos or rng.random() < 0.7] or running[:1]
        taken = [row for row in taken if row.slot >= 0 or self._free_slots]
        for row in taken:
            if row.slot < 0 and self._free_slots:
                self._open(row)
        taken = [row for row in taken if row.slot >= 0]
        decoding = [row for row in taken if row.on_device]
        filling = [row for row in taken if row not in decoding]
        plan = StepPlan([], [], [], [], [], [])
        budget = self._max_tokens - len(decoding)
        for row in decoding + filling:
            self._plan(plan, row, budget)
            budget -= 0 if row in decoding else plan.counts[-1]
            if budget <= 0:
                break
        self.plans.append(plan)
        rows = {row.slot: row for row in taken}
        self._take(plan, rows, self._launch(plan, rows))

    def _launch(self, plan: StepPlan, rows: dict[int, _Row]) -> StepOutput:
        if not plan.masked:
            return launch(self.runner, plan).collect()
        launch_forward(self.runner, plan)
        vocab, masks = self.runner.facts.vocab_size, self.runner.mask_lines(len(plan.masked))
        for line, slot in zip(masks, plan.masked, strict=True):
            allowed = rows[slot].ask.allowed
            assert allowed is not None
            line[:] = pack(allowed(rows[slot].said), vocab)
        return self.runner.launch_draws(masks).collect()

    def _plan(self, plan: StepPlan, row: _Row, budget: int) -> None:
        left = len(row.tokens) - row.done
        count = self._rng.randint(1, left) if self._chaos else left
        count = min(count, budget)
        from_device = row.on_device
        plan.rows.append(row.slot)
        plan.starts.append(row.done)
        plan.counts.append(count)
        plan.from_device.append(from_device)
        plan.samples.append(int(count == left))
        if row.ask.allowed is not None and count == left:
            plan.masked.append(row.slot)
        if not from_device:
            plan.tokens.extend(row.tokens[row.done : row.done + count])
        while len(row.pages) * BLOCK_TOKENS < row.done + count:
            page = self._free_pages.pop()
            plan.new_blocks.append((row.slot, len(row.pages), page))
            row.pages.append(page)
        if row.ask.logprobs.prompt is not None and row.done < len(row.ask.prompt):
            plan.prompt_logprobs.append(row.slot)
        row.done += count

    def _take(self, plan: StepPlan, rows: dict[int, _Row], result: StepOutput) -> None:
        drawn = iter(result.tokens)
        entries = iter(result.logprobs or [None] * len(result.tokens))
        for slot, samples in zip(plan.rows, plan.samples, strict=True):
            if samples:
                rows[slot].said.append(next(drawn))
                rows[slot].on_device = True
                rows[slot].logprobs.append(next(entries))
        for slot, found in (result.prompt_logprobs or {}).items():
            rows[slot].prompt_logprobs += found


class Driver(RunnerDriver):
    """A driver with a ModelRunner of its own over `built`, and with the device's state or someone else's."""

    def __init__(
        self,
        built: BuiltModel,
        pages: Pages,
        *,
        seed: int = 0,
        chaos: bool = True,
        max_rows: int = 16,
        max_tokens: int = 256,
        state: DeviceState | None = None,
        graphs: bool = True,
        model_id: str = "tiny",
    ) -> None:
        config = EngineConfig(max_rows=max_rows, max_batch_tokens=max_tokens, graphs=graphs)
        self.state = state or DeviceState.create(built.device, config)
        runner = ModelRunner(built, facts_of(built, model_id), config, self.state)
        super().__init__(runner, pages, seed=seed, chaos=chaos, max_rows=max_rows, max_tokens=self.state.max_tokens)
