"""Tokens grouped by adapter: every token of a row with an adapter once, in chunks of one adapter within the bounds that graphs rely on."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.interfaces import StepPlan
from runtime.engine.kernels import inputs as layout
from runtime.engine.kernels.adapters import FEW_TOKENS, chunk_tokens, max_chunks
from runtime.engine.model.run.adapter_chunks import group_by_adapter
from runtime.engine.model.run.buckets import DECODE_ROWS, MIXED_TOKENS
from runtime.engine.model.run.input_buffers import pack

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
    assert sorted(covered) == list(range(len(owner)))
    assert sorted(order.tolist()) == list(range(len(owner)))
    slots = chunks[:, 0].tolist()
    assert slots == sorted(slots, key=lambda slot: (slot < 0, slot))


@given(ROWS)
def test_group_by_adapter_stays_within_the_grid_of_a_graph(rows: list[tuple[int, int]]) -> None:
    """Chunks are cut for the step's own size; the graph is of a larger one."""
    num_tokens = sum(count for _, count in rows)
    firsts = np.cumsum([0, *(count for _, count in rows)])
    size = chunk_tokens(num_tokens, on_gpu=True)
    chunks, _ = group_by_adapter([slot for slot, _ in rows], firsts, size)
    for bucket in (*DECODE_ROWS, *MIXED_TOKENS, num_tokens):
        if bucket >= num_tokens and chunk_tokens(bucket, on_gpu=True) == size:
            assert len(chunks) <= max_chunks(bucket, 7, size)


def test_chunk_size_of_a_step_is_that_of_its_graph() -> None:
    """A step is padded up to the next bucket, which must not be beyond the bound where the chunks' size changes."""
    assert FEW_TOKENS in DECODE_ROWS
    assert FEW_TOKENS in MIXED_TOKENS


def test_group_by_adapter_gives_no_chunk_without_tokens() -> None:
    chunks, order = group_by_adapter([], np.array([0]), 16)
    assert chunks.shape == (0, 3)
    assert order.shape == (0,)


def test_pack_groups_samples_apart_from_the_tokens_of_their_rows() -> None:
    """Rows: 5 tokens of a prompt that goes on, 1 token, 3 tokens with their draft's draws, 1 token."""
    plan = StepPlan(
        [0, 1, 2, 3],
        [0, 9, 4, 7],
        [5, 1, 3, 1],
        [False, True, False, True],
        [0, 1, 2, 1],
        [1] * 8,
        [],
        adapters=[2, -1, 0, 2],
    )
    words = np.zeros(200, np.int32)
    pack(plan, 0, words, 8, on_gpu=True)

    def chunks(number: int, at: int, order: int) -> list[tuple[int, list[int]]]:
        found = words[words[at] : words[at] + 3 * words[number]].reshape(-1, 3).tolist()
        return [(slot, words[words[order] + first :][:count].tolist()) for slot, first, count in found]

    assert chunks(layout.NUM_CHUNKS, layout.AT_CHUNKS, layout.AT_ORDER) == [
        (0, [6, 7, 8]),
        (2, [0, 1, 2, 3, 4, 9]),
        (-1, [5]),
    ]
    assert chunks(layout.NUM_SAMPLE_CHUNKS, layout.AT_SAMPLE_CHUNKS, layout.AT_SAMPLE_ORDER) == [
        (0, [1, 2]),
        (2, [3]),
        (-1, [0]),
    ]


def test_pack_groups_no_samples_of_a_decode_step() -> None:
    """Every token is drawn from there, so no token is dropped."""
    plan = StepPlan([0, 1], [4, 7], [1, 1], [True, True], [1, 1], [], [], adapters=[0, 1])
    words = np.zeros(100, np.int32)
    pack(plan, 0, words, 8, on_gpu=True)
    assert words[layout.NUM_CHUNKS] == 2
    assert words[layout.NUM_SAMPLE_CHUNKS] == 0
