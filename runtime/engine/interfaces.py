"""The seam between deciding and doing: what the scheduler asks of a model's runner, as plain data.

A *row* is one running sequence's stable slot in the engine's row tables (0 … max_rows-1), kept from admission to its end. A *page id* names
one KV block of a model in units that the runner's memory gave (kvcache.blocks hands them out; the runner never invents one). Knows nothing of
torch, time, or how tokens are drawn. Plans hold everything that a follower rank would need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.ipc.messages import TokenLogprobs
from runtime.types import Checkpoint, GenerationRequest, LogprobParams, ModelFacts, SamplingParams


@dataclass(frozen=True, slots=True)
class RowSetup:
    """What the runner must know of a row before its first step. `prompt` feeds repetition penalties only.

    `suppressed` ids can't be drawn before `min_tokens` tokens were. `prompt_len` counts the ids of the original prompt; after a preemption the
    row is opened again with the same `prompt_len`, and what it had generated comes as further tokens of its first chunks.
    """

    row: int
    sampling: SamplingParams
    logprobs: LogprobParams
    prompt: Sequence[int]
    prompt_len: int
    min_tokens: int = 0
    suppressed: tuple[int, ...] = ()
    masked: bool = False  # every draw of the row waits for a mask


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass of one model. The lists run in parallel, one entry a row; decode rows come first.

    Attributes:
        rows: row slots, each at most once.
        starts: position of the first token that this step computes in the row.
        counts: tokens that it computes in the row (1 in decode).
        from_device: the (only) input id is the row's last drawn token, which lies on the device; else its ids are in `tokens`.
        samples: tokens to draw, one after each of the row's last `samples` computed tokens: 0 for a prompt's chunks before the last, 1 as a rule, and
            1 + the number of drafts for a row with drafts.
        tokens: input ids of all rows that are not `from_device`, end to end in row order; a row's drafts are its last ones.
        new_blocks: (row, index in the row's page table, page id), before the step runs.
        prompt_logprobs: rows whose prompt log-probabilities are wanted for this chunk.
        masked: rows that sample in this step and whose draw waits for a mask.
        pooled: rows whose last computed token's hidden state is wanted.
    """

    rows: list[int]
    starts: list[int]
    counts: list[int]
    from_device: list[bool]
    samples: list[int]
    tokens: list[int]
    new_blocks: list[tuple[int, int, int]] = field(default_factory=list)
    prompt_logprobs: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    pooled: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a step, in the plan's order of the rows that sample.

    `tokens` holds as many tokens of each row as the plan says in `samples`; those that follow a wrong draft are meaningless. `logprobs` has an entry per
    token, None for rows without log-probabilities. `prompt_logprobs` maps a row to the entries of this chunk's tokens:
    the entry of the token at position p says how likely p's id was given what precedes it; position 0 has None. A chunk that isn't the last leaves
    out the entry of the token after it (it comes first in the next chunk's list).
    """

    tokens: list[int]
    device_us: float
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] | None = None
    vectors: dict[int, bytes] | None = None  # by row, float32 values: the plan's `pooled` rows


TokenMasks = npt.NDArray[np.int32]
"""Packed masks [rows, mask_words(vocab_size)]: bit t % 32 of word t // 32 is set if token t may be drawn."""


def mask_words(vocab_size: int) -> int:
    """Words of one packed mask."""
    return -(-vocab_size // 32)


class MaskSource(Protocol):
    """The tokens with which one sequence may continue, computed on the host in the engine thread."""

    def fill_mask(self, words: TokenMasks) -> None:
        """Write the mask [words] of the next token, with at least one bit set.

        Called once per draw, after the step's forward pass has been launched and all earlier tokens have been accepted. If it raises, or leaves the
        mask empty, the sequence ends with an error.
        """

    def accept(self, tokens: Sequence[int]) -> None:
        """Advance by tokens that were drawn. An error in here is raised by the next `fill_mask`."""


class MaskSources(Protocol):
    """Makes the mask sources of requests that have a grammar."""

    def open(self, checkpoint: Checkpoint, request: GenerationRequest) -> MaskSource:
        """Return a mask source for one sequence. Raises RepertoryError if the grammar cannot be enforced for this model."""


class Drafter(Protocol):
    """Guesses how sequences go on. A step verifies the guesses, so they change the speed and never the text."""

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return at most `most` tokens that may follow `tokens`, the prompt and all output of one sequence."""


class Launched(Protocol):
    """A step that was launched."""

    def ready(self) -> bool:
        """Whether `collect` would return at once."""

    def collect(self) -> StepOutput:
        """Wait for the step and return its result; once."""


class Runner(Protocol):
    """One model, able to run steps while it is resident. Everything is called from the engine thread, launches in order.

    KV pages given in plans must be mapped; weights must be resident (or on their way: `launch` waits on the device, not on the host).
    """

    facts: ModelFacts

    def open_row(self, setup: RowSetup) -> None:
        """Take up a row, or a row's return after a preemption."""

    def close_row(self, row: int) -> None:
        """Forget a row. Steps already launched may still write its state."""

    def launch(self, plan: StepPlan) -> Launched:
        """Queue one forward pass and the draws of a plan without masked rows. Returns without waiting for the device (on a CPU: when it is done)."""

    def launch_forward(self, plan: StepPlan) -> None:
        """Queue the forward pass of a plan with masked rows. No other step of any model may be launched before `launch_draws`."""

    def launch_draws(self, masks: TokenMasks) -> Launched:
        """Queue the draws of the forward pass that was launched last. `masks` [len(plan.masked), words] has one line per masked row."""

    def close(self) -> None:
        """Give up what it holds on the device beside its memory (graphs). Before the memory's own close; no step may be in flight."""


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """How KV blocks of one model lie in slabs: what kvcache.blocks needs to hand out page ids.

    Slab i of the model's KV range holds `blocks_per_slab` blocks with page ids `i * pages_per_slab + j * pages_per_block`, j counted from 0.
    """

    block_tokens: int
    blocks_per_slab: int
    pages_per_slab: int
    pages_per_block: int
    bytes_per_token: int
    max_slabs: int  # length of the reserved KV range


class ModelMemory(Protocol):
    """One loaded model's ranges in device memory: the mechanism under residency and kvcache.

    Slab ids are the device pool's; the pool (memory.slabs) decides who has which, this maps them.
    """

    weight_slabs: int
    weight_bytes: int
    kv: KvGeometry

    def swap_in(self, slabs: Sequence[int]) -> None:
        """Map `slabs` under the weights and start bringing the weights in, from the host arena or from disk. Returns at once where the device can copy on its own."""

    def swap_in_done(self) -> bool:
        """Whether the last byte has come."""

    def evict(self) -> None:
        """Unmap the weights after the last launched step. Copies nothing. The caller gives the slabs back."""

    def map_kv(self, index: int, slab: int) -> None:
        """Put a slab at place `index` of the KV range."""

    def unmap_kv(self, index: int) -> None:
        """Take it away again, after the last launched step."""

    def host_bytes(self) -> int:
        """Bytes that the model holds in the host arena."""

    def drop_host(self) -> None:
        """Give the host arena's chunks back; the model then returns from disk."""

    def close(self) -> None:
        """Give up all ranges."""


class Backend(Protocol):
    """The device, as the loop sees it: makes and unmakes models. The only thing in the engine that the loop doesn't decide."""

    device: str
    device_name: str
    slab_bytes: int
    total_slabs: int  # the device budget
    host_total_bytes: int
    max_rows: int

    def host_free_bytes(self) -> int: ...

    def load(self, request: "LoadRequest") -> "LoadJob":
        """Start admitting a model: build, lay out, read into the host arena (GPU). Runs in a thread of its own; touches no slab."""

    def synchronize(self) -> None:
        """Wait for all launched work (tests and shutdown only)."""

    def idle(self, mark: Callable[[str], None]) -> bool:
        """Do one piece of background work (a graph capture, a slab of the arena); True if there was one. Called when no model has work.

        `mark` is told a model before anything of it runs, as before a step.
        """


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """`runtime.ipc.messages.Load` as the backend sees it."""

    model_id: str
    checkpoint: "object"  # runtime.types.Checkpoint; opaque to policy
    max_model_len: int | None


@dataclass(slots=True)
class LoadResult:
    runner: Runner
    memory: ModelMemory


class LoadJob(Protocol):
    """A load on its way."""

    def done(self) -> bool: ...

    def result(self) -> LoadResult:
        """The model, or raises runtime.errors.RepertoryError. One that came in spite of a cancellation is the asker's to close, in the engine thread:
        graphs are that thread's alone."""

    def cancel(self) -> None:
        """Stop as soon as possible and leave nothing behind."""
