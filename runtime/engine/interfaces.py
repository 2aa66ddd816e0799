"""The interfaces between the engine's scheduling and its device work. What crosses them is plain data.

A *row* is a running sequence's slot in the engine's row tables (0 … max_rows - 1), from its admission to its end or preemption. A *page id* names
one KV block of a model in units that the model's memory defines; kvcache.blocks hands page ids out. A plan holds everything that a follower rank needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import msgspec

from runtime.engine.grammar.interfaces import TokenMasks
from runtime.ipc.messages import TokenLogprobs
from runtime.types import LogprobParams, ModelFacts, SamplingParams

NO_TOKEN = -1  # the draw of logits that have no finite maximum


@dataclass(frozen=True, slots=True)
class RowSetup:
    """Describes a row to the runner before the row's first step. `prompt` is used by repetition penalties only.

    `suppressed` ids are not drawn before `min_tokens` tokens have been. `prompt_len` counts the ids of the original prompt; after a preemption the
    row is opened again with the same `prompt_len`, and its earlier output is part of the first chunks.
    """

    row: int
    sampling: SamplingParams
    logprobs: LogprobParams
    prompt: Sequence[int]
    prompt_len: int
    min_tokens: int = 0
    suppressed: tuple[int, ...] = ()
    masked: bool = False  # every draw of the row waits for a mask


Reduction = Literal["sum", "weighted", "max"]
"""How hidden states become one vector. A weighted sum gives the state at position p of its row the weight p + 1."""


class StepPlan(msgspec.Struct, frozen=True):
    """One forward pass of one model. The lists are parallel, with one entry per row; decode rows come first.

    Attributes:
        rows: row slots, each at most once.
        starts: position of the first token that this step computes in the row.
        counts: tokens that this step computes in the row (1 in decode).
        from_device: the only input id is the row's last drawn token, which is on the device; otherwise the ids are in `tokens`.
        samples: tokens to draw, one after each of the row's last `samples` computed tokens: 0 for a prompt's chunks before the last, 1 as a rule, and
            1 + the number of drafts for a row with drafts.
        tokens: input ids of all rows that are not `from_device`, end to end in row order; a row's drafts are its last ones.
        new_blocks: (row, index in the row's page table, page id), before the step runs.
        prompt_logprobs: rows whose prompt log-probabilities are wanted for this chunk.
        masked: rows that sample in this step and whose draw waits for a mask. A row that has left them does not return before it is opened again.
        pooled: (row, start, end, reduction) of the last hidden states of the row's tokens at these positions, which the step computes. The entries of
            a row are neighbours. Only sums may be of no token.
        adapters: slot of each row's LoRA adapter, -1 = none; empty if no row has one.
    """

    rows: list[int]
    starts: list[int]
    counts: list[int]
    from_device: list[bool]
    samples: list[int]
    tokens: list[int]
    new_blocks: list[tuple[int, int, int]] = []
    prompt_logprobs: list[int] = []
    masked: list[int] = []
    pooled: list[tuple[int, int, int, Reduction]] = []
    adapters: list[int] = []

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class Bucket(NamedTuple):
    """The sizes of a padded step. Its CUDA graph runs every step that exceeds none of them."""

    num_tokens: int
    num_rows: int
    max_query_len: int
    max_context_len: int
    adapted: bool = False  # some rows have a LoRA adapter

    def within(self, max_rows: int, max_tokens: int) -> "Bucket":
        """Return the bucket limited to the largest possible step."""
        rows, tokens = min(self.num_rows, max_rows), min(self.num_tokens, max_tokens)
        return self._replace(num_tokens=tokens, num_rows=rows, max_query_len=min(self.max_query_len, tokens))


class GraphChoice(NamedTuple):
    """How to run a step: `replay` a graph that exists, or `capture` one first. Neither: run the step as it is."""

    replay: Bucket | None = None
    capture: Bucket | None = None


class GraphCapture(NamedTuple):
    """One piece of work for the graph of a bucket: run the bucket once, or record its graph."""

    model_id: str
    bucket: Bucket
    record: bool


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a step, in the plan's order of the rows that sample.

    `tokens` holds as many tokens of each row as the plan says in `samples`; those that follow a wrong draft are meaningless. NO_TOKEN stands where the
    logits have a NaN, or no finite maximum. `logprobs` has an entry per
    token, None for rows without log-probabilities. `prompt_logprobs` maps a row to the entries of this chunk's tokens:
    the entry of the token at position p says how likely p's id was given what precedes it; position 0 has None. A chunk that is not the last leaves
    out the entry of the token after it (it comes first in the next chunk's list).
    """

    tokens: list[int]
    device_us: float
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] | None = None
    vectors: dict[int, bytes] | None = None  # by row, float32 values: the results of the plan's `pooled`, end to end


class Drafter(Protocol):
    """Guesses how sequences continue. A step verifies the guesses, so they change the speed and never the text."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow `tokens`, the prompt and all output of one sequence."""


class Launched(Protocol):
    """A step that was launched."""

    def ready(self) -> bool:
        """Whether `collect` would return at once."""

    def collect(self) -> StepOutput:
        """Wait for the step and return its output. Must be called once."""


class Runner(Protocol):
    """Runs one model's steps while the model is resident. All methods are called from the engine thread, launches in order.

    The KV pages of a plan must be mapped. The weights must be resident or being copied: then the step waits for them on the device.
    """

    facts: ModelFacts

    def expect_adapters(self) -> None:
        """Prepare for steps whose rows have adapters: the first adapter was loaded."""

    def open_row(self, setup: RowSetup) -> None:
        """Set up a row, also for a sequence that returns after a preemption."""

    def close_row(self, row: int) -> None:
        """Forget a row. Steps already launched may still write its state."""

    def choose_graph(self, plan: StepPlan) -> GraphChoice:
        """Count a use of the plan's bucket, and choose how the plan runs."""

    def has_graph(self, bucket: Bucket) -> bool:
        """Whether a step of this bucket would replay a graph."""

    def is_prepared(self) -> bool:
        """Whether idle turns have done what speeds up a first request."""

    def capture(self, bucket: Bucket, *, record: bool) -> None:
        """Run the bucket once or, if `record`, record its graph. A failure only leaves the bucket without a graph."""

    def launch(self, plan: StepPlan, padded_to: Bucket | None = None) -> Launched:
        """Queue one forward pass and the draws of a plan without masked rows. Returns without waiting for the device (on a CPU: when it is done).

        `padded_to`: the sizes of the pass. A graph runs it if there is one. None = the plan's own sizes.
        """

    def launch_forward(self, plan: StepPlan, padded_to: Bucket | None = None) -> None:
        """Queue the forward pass of a plan with masked rows. No other step of any model may be launched before `launch_draws`."""

    def mask_lines(self, count: int) -> TokenMasks:
        """Return `count` lines of any content for the next draws' masks. They are the same at each call: earlier draws must have been collected."""

    def launch_draws(self, masks: TokenMasks) -> Launched:
        """Queue the draws of the last forward pass. `masks` [len(plan.masked), words], such as `mask_lines`, has a line per masked row. It may be changed."""

    def close(self) -> None:
        """Release the graphs. Called before the memory is closed; no step may be in flight."""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The layout of one model's KV blocks in slabs, from which kvcache.blocks computes page ids.

    Slab i of the model's KV range holds `blocks_per_slab` blocks with page ids `i * pages_per_slab + j * pages_per_block`, j counted from 0.
    """

    block_tokens: int
    blocks_per_slab: int
    pages_per_slab: int
    pages_per_block: int
    bytes_per_token: int
    max_slabs: int  # length of the reserved KV range


class HostKvMemory(Protocol):
    """Host memory for copies of one model's KV blocks, in chunks of a slab's size in which blocks lie as in a slab.

    A host page names a block in a chunk as a page id names one in a slab.
    """

    def map(self, index: int) -> None:
        """Take a chunk for place `index`."""

    def unmap(self, index: int) -> None:
        """Release the chunk at place `index`. Its content is lost."""

    def save(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Begin to copy blocks (page, host page) from the device after the last launched step.

        Their slabs may be unmapped at once, and must be before a step writes to them.
        """

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Begin to copy blocks (page, host page) to the device. Steps launched later wait for the copies."""


class ModelMemory(Protocol):
    """One loaded model's ranges in device memory. Slab ids are those of the device's pool, which decides which model holds which slab."""

    weight_slabs: int
    weight_bytes: int
    kv: KvGeometry

    @property
    def host_kv(self) -> HostKvMemory: ...

    def swap_in(self, slabs: Sequence[int]) -> None:
        """Map `slabs` under the weights and start to copy the weights in. Returns at once where the device copies by itself."""

    def swap_in_done(self) -> bool:
        """Whether the last byte has arrived."""

    def evict(self) -> None:
        """Unmap the weights after the last launched step. Copies nothing. The caller releases the slabs."""

    def map_kv(self, index: int, slab: int) -> None:
        """Map a slab at place `index` of the KV range."""

    def unmap_kv(self, index: int) -> None:
        """Unmap place `index` after the last launched step."""

    def host_bytes(self) -> int:
        """Bytes that the model holds in the host arena."""

    def drop_host(self) -> None:
        """Release the host copy. The next swap-in reads from disk."""

    def close(self) -> None:
        """Release all ranges."""


class AdapterBank(Protocol):
    """The range of device memory in which the adapters of one base lie, as long as the device budget. Which slabs lie under it is decided elsewhere.

    Attributes:
        num_slots: adapters that steps can name at once.
    """

    num_slabs: int
    num_slots: int

    def map(self, index: int, slab: int) -> None:
        """Map a slab at place `index` of the range."""

    def unmap(self, index: int) -> None:
        """Unmap place `index` after the last launched step."""

    def close(self) -> None:
        """Release the range."""


class AdapterMemory(Protocol):
    """One loaded adapter. `digest` is equal for adapters of equal content."""

    size_bytes: int
    digest: str

    def swap_in(self, slot: int, offset: int) -> None:
        """Have steps find the adapter in `slot`, and start to copy it to byte `offset` of its base's range, where slabs are mapped."""

    def swap_in_done(self) -> bool:
        """Whether the last byte has arrived. Raises LoadFailed if it will not."""

    def wait(self) -> None:
        """Have the steps launched from now on wait for the last byte. Raises LoadFailed if it will not arrive."""

    def evict(self) -> None:
        """Stop using the place. The caller unmaps the slabs that no adapter touches any more."""

    def host_bytes(self) -> int:
        """Bytes that the adapter holds in the host arena."""

    def drop_host(self) -> None:
        """Release the host copy. The next swap-in reads from disk."""

    def close(self) -> None:
        """Release everything. The adapter was evicted before."""


class Backend(Protocol):
    """The device of an engine. Loads models and adapters."""

    device: str
    device_name: str
    slab_bytes: int
    total_slabs: int  # the device budget, of which an engine that shares its device has a changing part
    host_total_bytes: int
    host_kv_bytes: int  # the most host memory that saved KV of all models may take; 0 = nothing is saved
    max_rows: int

    def host_free_bytes(self) -> int: ...

    def commit_slabs(self, slabs: Sequence[int]) -> None:
        """Take memory for slabs from the driver. Raises if there is not enough, and takes none then."""

    def decommit_slabs(self, slabs: Sequence[int]) -> None:
        """Give the memory of unmapped slabs back to the driver, after launched work that uses it. Slabs without memory are passed over."""

    def load(self, request: "LoadRequest") -> "LoadJob":
        """Start to load a model in a thread of its own: build it and, on a GPU, read its weights into the host arena. Uses no slab."""

    def load_adapter(self, request: "LoadRequest", base: "LoadResult") -> "AdapterJob":
        """Start to load an adapter of a loaded model, in a thread of its own. Uses no slab."""

    def synchronize(self) -> None:
        """Wait for all launched work (tests and shutdown only)."""

    def settle(self) -> None:
        """Wait for the launched passes, so that a fault is not attributed to a later model. Raises the device's error if the device is lost."""

    def next_capture(self) -> GraphCapture | None:
        """Return the capture that an idle turn should do, None = none. It stays the same until it was done."""

    def idle(self, mark: Callable[[str], None]) -> bool:
        """Do one piece of other background work, such as a slab of the arena; True if there was one. Called when no model has work.

        `mark` is called with a model's id before work of that model starts.
        """


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """`runtime.ipc.messages.Load` as the backend sees it."""

    model_id: str
    checkpoint: "object"  # runtime.types.Checkpoint; opaque to policy
    max_model_len: int | None


@dataclass(slots=True)
class LoadResult:
    """A loaded model. `adapters`: None = it takes none."""

    runner: Runner
    memory: ModelMemory
    adapters: AdapterBank | None = None


@dataclass(slots=True)
class AdapterResult:
    """A loaded adapter."""

    facts: ModelFacts
    memory: AdapterMemory


class LoadJob(Protocol):
    """A load that was started."""

    def done(self) -> bool: ...

    def result(self) -> LoadResult:
        """Return the model, or raise the load's RepertoryError. A load that completes despite cancellation must be closed, in the engine thread."""

    def cancel(self) -> None:
        """Stop as soon as possible and leave nothing behind."""


class AdapterJob(Protocol):
    """A load of an adapter that was started. As LoadJob."""

    def done(self) -> bool: ...

    def result(self) -> AdapterResult:
        """Return the adapter, or raise the load's RepertoryError. It may outlive the load of its base."""

    def cancel(self) -> None: ...
