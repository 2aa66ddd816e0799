"""Which steps are rounded up to what, and which padded sizes may serve the steps of others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.interfaces import Bucket
from runtime.engine.model.run.buckets import (
    CONTEXT_TOKENS,
    DECODE_ROWS,
    MIXED_TOKENS,
    bucket_of,
    covers,
    standard,
    wide,
)

LARGEST_CONTEXT = CONTEXT_TOKENS[-1]
LARGEST_MIXED = MIXED_TOKENS[-1]


def mixed_counts(least: int, most: int) -> st.SearchStrategy[list[int]]:
    """Tokens per row of steps with `least` to `most` tokens in all, of which one row at least has several."""
    splits = st.integers(least, most).flatmap(
        lambda total: st.lists(st.integers(1, total - 1), unique=True, max_size=39).map(
            lambda cuts: [end - start for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), total], strict=True)]
        )
    )
    return splits.filter(lambda counts: max(counts) > 1)


@given(rows=st.integers(1, DECODE_ROWS[-1]), context=st.integers(1, LARGEST_CONTEXT))
def test_bucket_of_decode_step_holds_the_step(rows: int, context: int) -> None:
    bucket = bucket_of(rows, rows, rows, 1, context)
    assert bucket is not None
    assert bucket.num_tokens == bucket.num_rows >= rows
    assert bucket.max_context_len >= context
    assert bucket.num_rows <= max(2 * rows, 8)
    assert bucket.max_query_len == 1


@given(rows=st.integers(DECODE_ROWS[-1] + 1, 2000), context=st.integers(1, LARGEST_CONTEXT))
def test_bucket_of_decode_step_with_too_many_rows_is_none(rows: int, context: int) -> None:
    assert bucket_of(rows, rows, rows, 1, context) is None


@given(rows=st.integers(1, DECODE_ROWS[-1]), context=st.integers(LARGEST_CONTEXT + 1, 2 * LARGEST_CONTEXT))
def test_bucket_of_decode_step_with_too_long_context_is_none(rows: int, context: int) -> None:
    assert bucket_of(rows, rows, rows, 1, context) is None


@given(counts=mixed_counts(2, LARGEST_MIXED))
def test_bucket_of_mixed_step_holds_the_step(counts: list[int]) -> None:
    bucket = bucket_of(sum(counts), len(counts), len(counts), max(counts), 300)
    assert bucket is not None
    assert bucket.num_tokens >= sum(counts)
    assert bucket.num_tokens >= bucket.num_rows >= len(counts)
    assert bucket.max_query_len >= max(counts)


@given(counts=mixed_counts(LARGEST_MIXED + 1, 3 * LARGEST_MIXED))
def test_bucket_of_mixed_step_with_too_many_tokens_is_none(counts: list[int]) -> None:
    assert bucket_of(sum(counts), len(counts), len(counts), max(counts), 300) is None


@given(tokens=st.integers(1, LARGEST_MIXED), rows=st.integers(1, 100), drafts=st.integers(0, 400))
def test_bucket_of_mixed_step_has_a_row_per_draw(tokens: int, rows: int, drafts: int) -> None:
    """A row with drafts draws several tokens, so draws may outnumber rows."""
    num_rows = min(rows, tokens)
    num_samples = min(num_rows + drafts, tokens, DECODE_ROWS[-1])
    bucket = bucket_of(tokens, num_rows, num_samples, max(2, tokens - num_rows + 1), 300)
    assert bucket is not None
    assert bucket.num_rows >= num_samples


@pytest.mark.parametrize(("least", "most", "ratio"), [(257, 512, 1.5), (513, LARGEST_MIXED, 4 / 3)])
def test_bucket_of_large_mixed_step_bounds_the_padding(least: int, most: int, ratio: float) -> None:
    for tokens in range(least, most + 1):
        bucket = bucket_of(tokens, 2, 2, tokens - 1, 4000)
        assert bucket is not None
        assert bucket.num_tokens <= ratio * tokens


def test_cuda_graphs_of_a_mixed_step_do_not_depend_on_the_context() -> None:
    assert bucket_of(60, 3, 3, 40, 100) == bucket_of(60, 3, 3, 40, 200_000)


def test_cuda_graphs_likely_sizes_are_those_of_steps() -> None:
    buckets = standard()
    assert len(set(buckets)) == len(buckets) <= 40
    for bucket in buckets:
        context = min(bucket.max_context_len, 4000)
        assert bucket_of(bucket.num_tokens, bucket.num_rows, bucket.num_rows, bucket.max_query_len, context) == bucket


@pytest.mark.parametrize("tokens", [1, 40, 100, 256, 384])
def test_cuda_graphs_of_a_single_request_come_first(tokens: int) -> None:
    buckets = standard()
    assert bucket_of(tokens, 1, 1, tokens, 400) in buckets[:8]


BUCKETS = st.one_of(
    st.builds(
        lambda rows, context, adapted: some(bucket_of(rows, rows, rows, 1, context))._replace(adapted=adapted),
        st.integers(1, DECODE_ROWS[-1]),
        st.integers(1, LARGEST_CONTEXT),
        st.booleans(),
    ),
    st.builds(
        lambda tokens, rows: some(bucket_of(tokens, min(rows, tokens), min(rows, tokens), 2, 1)),
        st.integers(2, LARGEST_MIXED),
        st.integers(1, 512),
    ),
)


def some(bucket: Bucket | None) -> Bucket:
    assert bucket is not None
    return bucket


@given(graph=BUCKETS, step=BUCKETS)
def test_covers_holds_the_step_and_bounds_the_padding(graph: Bucket, step: Bucket) -> None:
    if covers(graph, step):
        assert all(size >= needed for size, needed in zip(graph[:4], step[:4], strict=True))
        assert graph.num_tokens <= max(2 * step.num_tokens, 64 if step.max_query_len == 1 else 256)
        assert graph.adapted == step.adapted
    assert covers(step, step)


@given(step=BUCKETS)
def test_wide_bucket_covers_its_steps_and_itself(step: Bucket) -> None:
    assert covers(wide(step), step)
    assert wide(wide(step)) == wide(step)


def test_a_few_graphs_cover_all_short_steps() -> None:
    """So a model needs few of the graphs that 32 models can have."""
    steps = [bucket for bucket in standard() if bucket.num_rows <= 64 or bucket.max_query_len > 1]
    assert len({wide(step) for step in steps}) == 5
