"""Estimates the KV that a set of sequences will need at its peak, so that admitted sequences are rarely preempted."""

from collections import deque
from collections.abc import Sequence

import numpy as np

_HISTORY = 128
_ENOUGH = 16
_FIRST_GUESS = 256  # tokens, until enough lengths are known; requests without max_tokens allow the whole context
_QUANTILE = 0.9


def blocks_for(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens)


def peak_blocks(held: Sequence[int], remaining: Sequence[int], block_tokens: int) -> int:
    """Return the most blocks that sequences with `held` tokens and `remaining` to come use at any time, each growing by one token a step.

    The peak lies at the end of some sequence: then it and all sequences with more tokens to come hold blocks, each grown by that sequence's
    remainder (LightLLM's estimate). Each sequence's tokens are rounded up to blocks.
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
    # Σ ceil((now + r) / B) over the sequences that still run, at most one block per sequence above the exact sum
    return int(np.max(np.cumsum(whole + (rest > 0)) + alive * (grown_whole + (grown_rest > 0))))


class LengthEstimate:
    """Estimates the output length of one model's requests, which often allow far more tokens than they use."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=_HISTORY)
        self._typical: int | None = None

    def record(self, num_tokens: int) -> None:
        self._lengths.append(num_tokens)
        self._typical = None

    def expected(self, limit: int, generated: int) -> int:
        """Return how many tokens a sequence will still draw, of at most `limit`, after it has drawn `generated`."""
        left = limit - generated
        if self._typical is None:
            quantile = sorted(self._lengths)[int(_QUANTILE * (len(self._lengths) - 1))] if self._lengths else 0
            self._typical = quantile if len(self._lengths) >= _ENOUGH else max(quantile, _FIRST_GUESS)
        # A sequence beyond the typical length is expected to generate another quarter of its present length.
        return min(left, max(self._typical - generated, 16, generated // 4))
