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
        limit: tokens it may draw: max_tokens, or what the context leaves if that is less.
        computed: tokens whose KV the launched steps hold, while it prefills.
        hold_until: the step that must be settled before it may have a row again.
        place: its index in the decode batch, -1 = not there.
        cached: prompt tokens found in the prefix cache at its first admission.
        shared: blocks that it found at its admission, at the head of `pages`.
        set_aside: KV blocks that admission counted for it.
    """

    request_id: int
    tokens: list[int]
    prompt_len: int
    request: GenerationRequest
    arrival: int
    arrived_s: float
    limit: int
    mask_source: MaskSource | None = None
    state: State = State.WAITING
    row: int = -1
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    computed: int = 0
    place: int = -1
    hold_until: int = 0
    set_aside: int = 0
    shared: int = 0
    cached: int = 0
    queued_s: float | None = None  # from its arrival to its first row
    told: bool = False  # its first token has been sent
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def append(self, token: int) -> None:
        """Add a token that was drawn."""
        self.tokens.append(token)
        if self.mask_source is not None:
            self.mask_source.accept((token,))

    @property
    def drawn(self) -> int:
        """Output tokens that are known."""
        return len(self.tokens) - self.prompt_len

    @property
    def tokens_to_begin(self) -> int:
        """Tokens of KV it needs for its next draw, or for its prompt alone if it draws nothing."""
        return len(self.tokens) + (self.limit > 0)

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: higher priority, then earlier."""
        return (-self.request.priority, self.arrival)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.logprobs.prompt is not None and not self.told


def from_add(add: Add, arrival: int, now: float, max_model_len: int, mask_source: MaskSource | None = None) -> Sequence:
    request = add.request
    tokens = list(request.prompt)
    limit = max(0, min(request.stop.max_tokens, max_model_len - len(tokens)))
    return Sequence(add.request_id, tokens, len(tokens), request, arrival, now, limit, mask_source)
