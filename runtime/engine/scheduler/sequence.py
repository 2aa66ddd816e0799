"""One request inside the engine: its tokens, what it asked for, and where it stands. Changed by the scheduler alone."""

from dataclasses import dataclass, field
from enum import IntEnum

from runtime.engine.interfaces import MaskSource
from runtime.ipc.messages import Add, TokenLogprobs
from runtime.types import GenerationRequest


class State(IntEnum):
    WAITING = 0  # has no row: new, or preempted
    RUNNING = 1
    ENDED = 2


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt and all output that is known; the device may be one or two tokens ahead.

    Attributes:
        max_output_tokens: tokens it may draw: max_tokens, or what the context leaves if that is less.
        num_computed_tokens: tokens whose KV the launched steps hold, while it prefills.
        blocked_until_step: the step that must be settled before it may have a row again.
        decode_index: its index in the decode batch, -1 = not there.
        num_cached_tokens: prompt tokens found in the prefix cache at its first admission.
        num_shared_blocks: blocks that it found at its admission, at the head of `block_ids`.
        reserved_blocks: KV blocks that admission counted for it.
    """

    request_id: int
    tokens: list[int]
    prompt_len: int
    request: GenerationRequest
    arrival: int
    arrived_s: float
    max_output_tokens: int
    mask_source: MaskSource | None = None
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
    queued_s: float | None = None  # from its arrival to its first row
    first_token_sent: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def append(self, token: int) -> None:
        """Add a token that was drawn."""
        self.tokens.append(token)
        if self.mask_source is not None:
            self.mask_source.accept((token,))

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that are known."""
        return len(self.tokens) - self.prompt_len

    @property
    def tokens_to_begin(self) -> int:
        """Tokens of KV it needs for its next draw, or for its prompt alone if it draws nothing."""
        return len(self.tokens) + (self.max_output_tokens > 0)

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: higher priority, then earlier."""
        return (-self.request.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.logprobs.prompt is not None and not self.first_token_sent


def from_add(add: Add, arrival: int, now: float, max_model_len: int, mask_source: MaskSource | None = None) -> Sequence:
    request = add.request
    tokens = list(request.prompt)
    limit = max(0, min(request.stop.max_tokens, max_model_len - len(tokens)))
    return Sequence(add.request_id, tokens, len(tokens), request, arrival, now, limit, mask_source)
