"""Computes the vectors of pooled sequences: selects the tokens of each chunk and combines the sums of the chunks."""

import numpy as np

from runtime.engine.scheduler.sequence import Sequence
from runtime.types import Pooling


def reads_every_chunk(pooling: Pooling | None) -> bool:
    """Whether the vector needs hidden states of tokens that a prefix hit would skip."""
    return pooling in (Pooling.MEAN, Pooling.FIRST)


def pooled_span(sequence: Sequence, start: int, end: int) -> tuple[int, int] | None:
    """Return which of the positions start … end, which a chunk computes, belong to the sequence's vector; None = none."""
    match sequence.request.pooling:
        case Pooling.MEAN:
            return start, end
        case Pooling.FIRST if start == 0:
            return 0, 1
        case Pooling.LAST if end == len(sequence.tokens):
            return end - 1, end
    return None


def add_pooled(sequence: Sequence, vector: bytes) -> None:
    """Add a chunk's sum, float32 values, to the sequence's vector."""
    values = np.frombuffer(vector, np.float32)
    sequence.pooled = values if sequence.pooled is None else sequence.pooled + values


def pooled_vector(sequence: Sequence) -> bytes | None:
    """Return the sequence's vector, float32 values, after its last chunk; None if it asks for none."""
    if sequence.pooled is None:
        return None
    vector = sequence.pooled
    if sequence.request.pooling is Pooling.MEAN:
        vector = vector / np.float32(sequence.prompt_len)
    return vector.tobytes()


def is_finite(vector: bytes) -> bool:
    """Whether all of a vector's float32 values are numbers."""
    return bool(np.isfinite(np.frombuffer(vector, np.float32)).all())
