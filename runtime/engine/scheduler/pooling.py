"""Computes the vectors of pooled sequences: selects the tokens of each chunk and combines the results of the chunks."""

import math

import numpy as np

from runtime.engine.interfaces import Reduction
from runtime.engine.scheduler.sequence import Sequence
from runtime.types import Pooling


def reads_every_chunk(pooling: tuple[Pooling, ...]) -> bool:
    """Whether the vector needs hidden states of tokens that a prefix hit would skip."""
    return any(mode is not Pooling.LAST for mode in pooling)


def pooled_spans(sequence: Sequence, start: int, end: int) -> list[tuple[int, int, Reduction]]:
    """Return which of the positions start … end, which a chunk computes, belong to each of the sequence's vectors.

    Empty if none belongs to any.
    """
    spans = [_span(mode, start, end, len(sequence.tokens)) for mode in sequence.request.pooling]
    return spans if any(first < last for first, last, _ in spans) else []


def _span(pooling: Pooling, start: int, end: int, num_tokens: int) -> tuple[int, int, Reduction]:
    match pooling:
        case Pooling.FIRST:
            return (start, start, "sum") if start else (0, 1, "sum")
        case Pooling.LAST:
            return end - 1 if end == num_tokens else end, end, "sum"
        case Pooling.MAX:
            return start, end, "max"
        case Pooling.WEIGHTED_MEAN:
            return start, end, "weighted"
        case Pooling.MEAN | Pooling.MEAN_SQRT_LEN:
            return start, end, "sum"


def add_pooled(sequence: Sequence, vector: bytes) -> None:
    """Combine a chunk's results, float32 values, with those of the chunks before it."""
    modes = sequence.request.pooling
    values = np.frombuffer(vector, np.float32).reshape(len(modes), -1)
    if sequence.pooled is None:
        sequence.pooled = values
        return
    combined = [
        np.maximum(before, now) if mode is Pooling.MAX else before + now
        for mode, before, now in zip(modes, sequence.pooled, values, strict=True)
    ]
    sequence.pooled = np.stack(combined)


def pooled_vector(sequence: Sequence) -> bytes | None:
    """Return the sequence's vectors, float32 values, after its last chunk; None if it asks for none."""
    if sequence.pooled is None:
        return None
    divisors = [_divisor(mode, sequence.prompt_len) for mode in sequence.request.pooling]
    return (sequence.pooled / np.array(divisors, np.float32)[:, None]).tobytes()


def _divisor(pooling: Pooling, num_tokens: int) -> float:
    match pooling:
        case Pooling.MEAN:
            return num_tokens
        case Pooling.MEAN_SQRT_LEN:
            return math.sqrt(num_tokens)
        case Pooling.WEIGHTED_MEAN:
            return num_tokens * (num_tokens + 1) / 2
        case Pooling.FIRST | Pooling.LAST | Pooling.MAX:
            return 1.0


def is_finite(vector: bytes) -> bool:
    """Whether all of a vector's float32 values are numbers."""
    return bool(np.isfinite(np.frombuffer(vector, np.float32)).all())
