"""Which padded size a small step is rounded up to, so that few CUDA graphs serve all of them. Pure: numbers in, numbers out."""

from bisect import bisect_left
from typing import NamedTuple

DECODE_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED_TOKENS = (16, 32, 64, 128, 256, 384, 512)
MIXED_ROWS = (4, 16, 64, 256, 512)
# Attention divides a row's keys among programs by the longest context that may come.
CONTEXT_TOKENS = (1024, 4096, 16384, 65536, 262144, 1048576, 4194304)


class Bucket(NamedTuple):
    """A padded step: its graph runs any step that is no larger in any number."""

    num_tokens: int
    num_rows: int
    max_query_len: int
    max_context_len: int


def bucket_of(num_tokens: int, num_rows: int, num_samples: int, max_query_len: int, max_context_len: int) -> Bucket | None:
    """The bucket of a step, None if it is too large for a graph to pay."""
    context = _at_least(CONTEXT_TOKENS, max_context_len)
    if context is None:
        return None
    if max_query_len == 1:
        rows = _at_least(DECODE_ROWS, num_rows)
        # a decode graph takes every token's logits; a prompt's chunk of one token that isn't the last is rare
        return None if rows is None or num_samples < num_rows else Bucket(rows, rows, 1, context)
    tokens = _at_least(MIXED_TOKENS, num_tokens)
    rows = _at_least(MIXED_ROWS, num_rows)
    if tokens is None or rows is None:
        return None
    return Bucket(tokens, min(rows, tokens), tokens, context)


def _at_least(sizes: tuple[int, ...], size: int) -> int | None:
    at = bisect_left(sizes, size)
    return sizes[at] if at < len(sizes) else None
