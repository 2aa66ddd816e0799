"""What the APIs ask of the generator, and what they get. Plain immutable data."""

import msgspec

from runtime.ipc.messages import TokenLogprobs
from runtime.types import FinishReason

# measured, docs/benchmarks/served.md; rounded up, since other things than tokens want their share of a core too
HTTP_EVENT_S = 28e-6
GRPC_EVENT_S = 125e-6


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What came of one sequence. Text may lag behind tokens (half a character, a possible stop string)."""

    index: int
    text: str
    tokens: tuple[int, ...]
    num_generated: int  # so far, this delta included
    finish: FinishReason | None = None
    stop: str | int | None = None  # the stop string, or the id of the EOS or stop token
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, if asked
    offsets: tuple[int, ...] = ()  # where each token's text begins in the output, in characters; if logprobs were asked
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # with the first delta, if asked
    cached_tokens: int | None = None  # with the first delta


class Completed(msgspec.Struct, frozen=True):
    """A whole sequence: its deltas put together."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish: FinishReason
    stop: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    offsets: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    cached_tokens: int


def put_together(deltas: list[Delta]) -> Completed:
    """`deltas` of one sequence, in order, the last with `finish` set."""
    first, last = deltas[0], deltas[-1]
    assert last.finish is not None
    return Completed(
        index=first.index,
        text="".join([delta.text for delta in deltas]),
        tokens=tuple([token for delta in deltas for token in delta.tokens]),
        finish=last.finish,
        stop=last.stop,
        logprobs=tuple([entry for delta in deltas for entry in delta.logprobs]),
        offsets=tuple([offset for delta in deltas for offset in delta.offsets]),
        prompt_logprobs=first.prompt_logprobs,
        cached_tokens=first.cached_tokens or 0,
    )
