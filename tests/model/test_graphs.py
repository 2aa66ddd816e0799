"""Which steps are rounded up to what, and when a graph is asked for, captured and replayed."""

from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.model.buckets import CONTEXT_TOKENS, DECODE_ROWS, MIXED_TOKENS, Bucket, bucket_of
from runtime.engine.model.graphs import EAGER_USES, GraphPool, ModelGraphs, StepGraph
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family


@given(rows=st.integers(1, 600), context=st.integers(1, 5_000_000))
def test_decode_steps_fit_their_bucket(rows: int, context: int) -> None:
    bucket = bucket_of(rows, rows, rows, 1, context)
    if rows > DECODE_ROWS[-1] or context > CONTEXT_TOKENS[-1]:
        assert bucket is None
        return
    assert bucket is not None
    assert bucket.num_tokens == bucket.num_rows >= rows
    assert bucket.max_context_len >= context
    assert bucket.num_rows <= max(2 * rows, 8)
    assert bucket.max_query_len == 1


@given(counts=st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_mixed_steps_fit_their_bucket(counts: list[int]) -> None:
    if max(counts) == 1:
        return
    bucket = bucket_of(sum(counts), len(counts), len(counts), max(counts), 300)
    if sum(counts) > MIXED_TOKENS[-1]:
        assert bucket is None
        return
    assert bucket is not None
    assert bucket.num_tokens >= sum(counts)
    assert bucket.num_tokens >= bucket.num_rows >= len(counts)
    assert bucket.max_query_len >= max(counts)


@dataclass
class FakePool:
    """Records without a device."""

    enabled: bool = True
    full: bool = False
    fails: bool = False
    wanted: list[Bucket] = field(default_factory=list)
    recorded: int = 0

    def want(self, graphs: ModelGraphs, bucket: Bucket) -> None:
        self.wanted.append(bucket)

    def record(self, run: object) -> StepGraph:
        self.recorded += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return StepGraph(cast("torch.cuda.CUDAGraph", None), torch.zeros(0))


BUCKET = Bucket(4, 4, 1, 1024)


def graphs_of(pool: FakePool, ready: bool = True) -> tuple[ModelGraphs, list[str]]:
    done: list[str] = []

    def run(bucket: Bucket) -> torch.Tensor:
        done.append("run")
        return torch.zeros(0)

    return ModelGraphs("tiny", cast("GraphPool", pool), lambda: done.append("blank"), run, lambda: ready), done


def test_the_second_use_asks_and_an_idle_turn_captures() -> None:
    pool = FakePool()
    graphs, done = graphs_of(pool)
    assert graphs.find(BUCKET) is None
    assert pool.wanted == []
    assert graphs.find(BUCKET) is None
    assert graphs.find(BUCKET) is None
    assert pool.wanted == [BUCKET]
    assert graphs.capture(BUCKET)
    assert done == ["blank", "run"]
    assert not graphs.capture(BUCKET)
    assert graphs.find(BUCKET) is not None


def test_a_busy_model_captures_in_place() -> None:
    graphs, _ = graphs_of(FakePool())
    assert [graphs.find(BUCKET) is None for _ in range(EAGER_USES + 1)] == [True] * EAGER_USES + [False]


def test_nothing_is_captured_into_a_full_pool_or_replayed_while_weights_come() -> None:
    pool = FakePool(full=True)
    graphs, done = graphs_of(pool)
    assert all(graphs.find(BUCKET) is None for _ in range(2 * EAGER_USES))
    absent, _ = graphs_of(FakePool(), ready=False)
    assert all(absent.find(BUCKET) is None for _ in range(2 * EAGER_USES))
    assert not absent.capture(BUCKET)
    assert done == []


def test_a_model_that_cannot_be_captured_is_tried_once_and_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    pool = FakePool(fails=True)
    graphs, _ = graphs_of(pool)
    assert all(graphs.find(BUCKET) is None for _ in range(3 * EAGER_USES))
    assert not graphs.capture(Bucket(8, 8, 1, 1024))
    assert pool.recorded == 1
    assert "model tiny runs without CUDA graphs" in caplog.text


@pytest.mark.gpu
def test_replayed_steps_say_what_eager_ones_say() -> None:
    """Padded rows, changing batches, models that share the pool, rows that sample beside plain ones."""
    torch.backends.cuda.matmul.allow_tf32 = False
    asks = [Ask([(7 * i + j) % VOCAB for j in range(3 + 9 * i)], 40) for i in range(7)]
    models = [family(name).cuda() for name in ("llama", "gemma3")]
    for model in models:
        model.generation_config.eos_token_id = None
    eager = [Driver(*hooked(model, device="cuda"), seed=3, graphs=False).run(asks) for model in models]
    drivers: list[Driver] = []
    for model in models:
        drivers.append(Driver(*hooked(model, device="cuda"), seed=3, state=drivers[0].state if drivers else None))
    for _ in range(2):                                     # the second round replays what idle turns captured after the first
        for driver, expected in zip(drivers, eager, strict=True):
            assert [a.tokens for a in driver.run(asks)] == [a.tokens for a in expected]
        while drivers[0].state.capture_one():
            pass
    assert drivers[0].state.graphs.used_bytes > 0
    for driver in drivers:
        driver.runner.close()
