"""Groups a step's tokens by adapter, for the kernels: an order of the tokens, cut into chunks of one adapter each."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def group_by_adapter(adapters: Sequence[int], firsts: Ints, chunk_tokens: int) -> tuple[Ints, Ints]:
    """Return the chunks [C, 3] (slot, first place in the order, number of tokens) and the order, token indices.

    `adapters` [B] has each row's slot, -1 for none; row b has the tokens firsts[b] … firsts[b + 1] - 1. No chunk has more than `chunk_tokens` tokens.
    Tokens without an adapter come last, in chunks of slot -1.
    """
    slots = np.asarray(adapters, np.int64)
    # As unsigned numbers, -1 is the largest.
    rows = np.argsort(slots.view(np.uint64), kind="stable")
    counts = (firsts[1:] - firsts[:-1])[rows]
    ends = np.cumsum(counts)
    order = np.repeat(firsts[rows] - (ends - counts), counts) + np.arange(int(counts.sum()))
    at = np.flatnonzero(np.diff(slots[rows], prepend=-2))
    found = slots[rows[at]]
    sizes = np.add.reduceat(counts, at)
    num_chunks = -(-sizes // chunk_tokens)
    inside = (
        np.arange(int(num_chunks.sum())) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
    ) * chunk_tokens
    starts = np.repeat(np.cumsum(sizes) - sizes, num_chunks) + inside
    lengths = np.minimum(np.repeat(sizes, num_chunks) - inside, chunk_tokens)
    return np.stack((np.repeat(found, num_chunks), starts, lengths), axis=1), order
