"""Tokens grouped by adapter: every token of a row with an adapter once, in chunks of one adapter within the bounds that graphs rely on."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.kernels.adapters import FEW_TOKENS, chunk_tokens, max_chunks
from runtime.engine.model.run.adapter_chunks import group_by_adapter
from runtime.engine.model.run.buckets import DECODE_ROWS, MIXED_TOKENS

ROWS = st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 90)), min_size=1, max_size=30)


@given(ROWS, st.integers(1, 70))
def test_group_by_adapter_covers_each_token_once(rows: list[tuple[int, int]], most: int) -> None:
    firsts = np.cumsum([0, *(count for _, count in rows)])
    chunks, order = group_by_adapter([slot for slot, _ in rows], firsts, most)
    owner = [slot for slot, count in rows for _ in range(count)]
    covered: list[int] = []
    for slot, first, count in chunks.tolist():
        assert 0 < count <= most
        tokens = order[first : first + count].tolist()
        assert {owner[token] for token in tokens} == {slot}
        covered += tokens
    assert sorted(covered) == [token for token, slot in enumerate(owner) if slot >= 0]


@given(ROWS)
def test_group_by_adapter_stays_within_the_grid_of_a_graph(rows: list[tuple[int, int]]) -> None:
    """Chunks are cut for the step's own size; the graph is of a larger one."""
    num_tokens = sum(count for _, count in rows)
    firsts = np.cumsum([0, *(count for _, count in rows)])
    size = chunk_tokens(num_tokens, on_gpu=True)
    chunks, _ = group_by_adapter([slot for slot, _ in rows], firsts, size)
    for bucket in (*DECODE_ROWS, *MIXED_TOKENS, num_tokens):
        if bucket >= num_tokens and chunk_tokens(bucket, on_gpu=True) == size:
            assert len(chunks) <= max_chunks(bucket, 7, on_gpu=True)


def test_chunk_size_of_a_step_is_that_of_its_graph() -> None:
    """A step is padded up to the next bucket, which must not be beyond the bound where the chunks' size changes."""
    assert FEW_TOKENS in DECODE_ROWS
    assert FEW_TOKENS in MIXED_TOKENS


def test_group_by_adapter_without_adapters_is_empty() -> None:
    chunks, order = group_by_adapter([-1, -1], np.array([0, 3, 4]), 16)
    assert chunks.shape == (0, 3)
    assert order.shape == (0,)
