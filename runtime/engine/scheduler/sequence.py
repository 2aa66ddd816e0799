"""Holds a request inside the engine: its tokens, its parameters and its state. The scheduler alone changes it."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from runtime.engine.grammar.interfaces import MaskSource
from runtime.engine.interfaces import RowSetup
from runtime.engine.scheduler.adapter_use import NO_ADAPTER, AdapterUse
from runtime.ipc.messages import Add, TokenLogprobs
from runtime.types import GenerationRequest


class State(IntEnum):
    WAITING = 0  # has no row: new, or preempted
    RUNNING = 1
    ENDED = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence. `tokens` is the prompt and all known output; the device may be one or two tokens ahead.

    Attributes:
        max_output_tokens: the request's max_tokens, or what the context leaves if that is less.
        mask_source: the source of the request's token masks; None = no grammar.
        is_unmasked: the mask source allows every token from now on, so no draw waits for it.
        num_computed_tokens: tokens whose KV the launched steps write. Not kept up to date for decode rows.
        decode_index: index in the decode batch, -1 = not a decode row.
        blocked_until_step: the step that must be settled before the sequence may be admitted again.
        reserved_blocks: KV blocks that admission counted for the sequence.
        num_shared_blocks: blocks found in the prefix cache at the last admission, at the head of `block_ids`.
        num_cached_tokens: prompt tokens found in the prefix cache before the first token was sent.
        pooled: [modes of the request's pooling, hidden size], of the hidden states so far, since the last admission.
        adapter: the sequence's LoRA adapter; None = the base alone.
    """

    request_id: int
    tokens: list[int]
    prompt_len: int
    request: GenerationRequest
    arrival: int
    arrived_s: float
    max_output_tokens: int
    mask_source: MaskSource | None = None
    is_unmasked: bool = False
    state: State = State.WAITING
    row: int = -1
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    num_computed_tokens: int = 0
    decode_index: int = -1
    blocked_until_step: int = 0
    reserved_blocks: int = 0
    num_shared_blocks: int = 0
    num_cached_tokens: int = 0
    pooled: npt.NDArray[np.float32] | None = None
    adapter: AdapterUse | None = None
    queued_s: float | None = None  # from arrival to the first row
    first_token_sent: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def append(self, token: int) -> None:
        """Add a token that was drawn."""
        self.tokens.append(token)
        if self.mask_source is not None:
            self.mask_source.accept((token,))

    @property
    def is_masked(self) -> bool:
        """Whether the draws that are planned from now on wait for masks."""
        return self.mask_source is not None and not self.is_unmasked

    @property
    def allows_all(self) -> bool:
        """Whether neither its mask source nor its other parameters exclude a token from now on. A mask carries both."""
        stop, sampling = self.request.stop, self.request.sampling
        return (
            self.mask_source is not None
            and self.mask_source.is_spent
            and not sampling.allowed_token_ids
            and self.num_output_tokens >= stop.min_tokens
        )

    @property
    def adapter_slot(self) -> int:
        """Where steps find the sequence's adapter; NO_ADAPTER if it has none."""
        return NO_ADAPTER if self.adapter is None else self.adapter.slot

    def count_adapter(self, *, live: int = 0, running: int = 0, generated_tokens: int = 0) -> None:
        """Add to the counters of the sequence's adapter, if it has one."""
        if self.adapter is not None:
            self.adapter.live += live
            self.adapter.running += running
            self.adapter.totals.generated_tokens += generated_tokens

    @property
    def prefix_root(self) -> bytes:
        """Begins the hashes of the sequence's KV blocks."""
        return b"" if self.adapter is None else self.adapter.prefix_root

    @property
    def num_output_tokens(self) -> int:
        """The number of known output tokens."""
        return len(self.tokens) - self.prompt_len

    @property
    def tokens_to_begin(self) -> int:
        """Tokens of KV that the next draw needs, or the prompt alone if nothing is drawn."""
        return len(self.tokens) + (self.max_output_tokens > 0)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sequences: higher priority first, then earlier arrival."""
        return (-self.request.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still to be sent."""
        return self.request.logprobs.prompt is not None and not self.first_token_sent


def from_add(
    add: Add,
    arrival: int,
    now: float,
    max_model_len: int,
    mask_source: MaskSource | None = None,
    adapter: AdapterUse | None = None,
) -> Sequence:
    """Make the sequence of an Add message."""
    request = add.request
    tokens = list(request.prompt)
    limit = max(0, min(request.stop.max_tokens, max_model_len - len(tokens)))
    return Sequence(add.request_id, tokens, len(tokens), request, arrival, now, limit, mask_source, adapter=adapter)


def row_setup(sequence: Sequence, suppressed: tuple[int, ...]) -> RowSetup:
    """Describe the sequence to the runner. `suppressed`: ids that may not be drawn before min_tokens."""
    request = sequence.request
    return RowSetup(
        sequence.row,
        request.sampling,
        request.logprobs,
        sequence.tokens[: sequence.prompt_len],
        sequence.prompt_len,
        request.stop.min_tokens,
        suppressed,
        sequence.is_masked,
    )
