"""How much KV a set of sequences will need at its worst, so that what is admitted rarely has to be turned out again.

Pure arithmetic over token counts; whether there is room is the caller's question.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

_HISTORY = 128
_ENOUGH = 16
_QUANTILE = 0.9


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


def peak_blocks(held: Sequence[int], remaining: Sequence[int], block_tokens: int) -> int:
    """The most blocks that sequences with `held` tokens and `remaining` to come use at any time, each growing by one token a step.

    Sorted by what remains, longest first, the peak lies at some sequence's end: then it and all longer ones are there, each grown by its
    remainder (LightLLM's estimate). Tokens round up to blocks one by one.
    """
    if not held:
        return 0
    left = np.asarray(remaining, dtype=np.int64)
    order = np.argsort(-left, kind="stable")
    left = left[order]
    now = np.asarray(held, dtype=np.int64)[order]
    whole, rest = np.divmod(now, block_tokens)
    grown_whole, grown_rest = np.divmod(left, block_tokens)
    alive = np.arange(1, len(left) + 1)
    # Σ ceil((now + r) / B) over the living, with one block more than exact where the two remainders fit into one
    return int(np.max(np.cumsum(whole + (rest > 0)) + alive * (grown_whole + (grown_rest > 0))))


class LengthEstimate:
    """How long this model's answers are: what is set aside for a request that allows far more than it will use."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_HISTORY)
        self._typical: int | None = None

    def record(self, num_tokens: int) -> None:
        self._lengths.append(num_tokens)
        self._typical = None

    def expected(self, limit: int, generated: int) -> int:
        """Tokens still to come of a sequence that may draw `limit` and has drawn `generated`."""
        left = limit - generated
        if len(self._lengths) < _ENOUGH:
            return left
        if self._typical is None:
            self._typical = sorted(self._lengths)[int(_QUANTILE * (len(self._lengths) - 1))]
        # one that has outgrown the typical length is expected to go on for a quarter of its age
        return min(left, max(self._typical - generated, 16, generated // 4))
