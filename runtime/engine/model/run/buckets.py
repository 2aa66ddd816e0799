"""Which padded size a small step is rounded up to, so that few CUDA graphs serve all of them. Pure: numbers in, numbers out."""

from bisect import bisect_left
from typing import NamedTuple

DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# A few hundred tokens take as long as the weights take to read, so padding is free there; beyond, a step is at most a third larger than it
# needs to be. From 1,024 tokens of an 8B model the device takes as long as Python needs to launch the step.
MIXED_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024)
MIXED_ROWS = (16, 512)  # rows cost their logits alone: under a twentieth of such a step
# Attention of a decode step divides a row's keys among programs by the longest context that may come.
CONTEXT_TOKENS = (1024, 4096, 16384, 65536, 262144, 1048576, 4194304)

_ANY_ROWS_TOKENS = 64  # up to here a token's logits cost nothing that shows
_LIKELY_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Bucket(NamedTuple):
    """A padded step: its graph runs any step that is no larger in any number."""

    num_tokens: int
    num_rows: int
    max_query_len: int
    max_context_len: int

    def within(self, max_rows: int, max_tokens: int) -> "Bucket":
        """No larger than any step can be."""
        rows, tokens = min(self.num_rows, max_rows), min(self.num_tokens, max_tokens)
        return Bucket(tokens, rows, min(self.max_query_len, tokens), self.max_context_len)


def bucket_of(
    num_tokens: int, num_rows: int, num_samples: int, max_query_len: int, max_context_len: int
) -> Bucket | None:
    """The bucket of a step, None if it is too large for a graph to pay."""
    context = _at_least(CONTEXT_TOKENS, max_context_len)
    if context is None:
        return None
    if max_query_len == 1:
        rows = _at_least(DECODE_ROWS, num_rows)
        # a decode graph takes every token's logits; a prompt's chunk of one token that isn't the last is rare
        return None if rows is None or num_samples < num_rows else _decode(rows, context)
    tokens = _at_least(MIXED_TOKENS, num_tokens)
    rows = _at_least(MIXED_ROWS, max(num_rows, num_samples)) if num_tokens > _ANY_ROWS_TOKENS else MIXED_ROWS[-1]
    return None if tokens is None or rows is None else _mixed(tokens, rows)


def standard() -> tuple[Bucket, ...]:
    """What a model will most likely meet, the likeliest first: captured unasked. Contexts beyond the first bound are captured when they come."""
    context = CONTEXT_TOKENS[0]
    likely = [_decode(rows, context) for rows in _LIKELY_ROWS]
    others = [_decode(rows, context) for rows in DECODE_ROWS if rows not in _LIKELY_ROWS]
    many = [_mixed(tokens, MIXED_ROWS[-1]) for tokens in MIXED_TOKENS]
    few = [_mixed(tokens, MIXED_ROWS[0]) for tokens in MIXED_TOKENS if tokens > _ANY_ROWS_TOKENS]
    # a lone request first, then a crowd that comes one by one
    return (likely[0], *many[:3], *few[:2], *likely[1:], *many[3:], *few[2:], *others)


def _decode(rows: int, context: int) -> Bucket:
    return Bucket(rows, rows, 1, context)


def _mixed(tokens: int, rows: int) -> Bucket:
    # the kernel for rows of many queries finds each row's length itself
    return Bucket(tokens, min(rows, tokens), tokens, CONTEXT_TOKENS[-1])


def _at_least(sizes: tuple[int, ...], size: int) -> int | None:
    at = bisect_left(sizes, size)
    return sizes[at] if at < len(sizes) else None
