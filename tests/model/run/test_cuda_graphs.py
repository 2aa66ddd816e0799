"""Which steps are rounded up to what, and when a graph is asked for, captured and replayed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.interfaces import Bucket
from runtime.engine.model.run.buckets import CONTEXT_TOKENS, DECODE_ROWS, MIXED_TOKENS, bucket_of, standard
from runtime.engine.model.run.cuda_graphs import EAGER_USES, GraphPool, ModelGraphs, StepGraph
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family
from tests.support.graphs import capture_all, capture_next, capture_now, use

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


@dataclass
class FakePool:
    """Records without a device."""

    enabled: bool = True
    full: bool = False
    fails: bool = False
    collective: bool = False
    wanted: list[Bucket] = field(default_factory=list)
    recorded: int = 0
    settle: Callable[[], None] = lambda: None

    def join(self, graphs: ModelGraphs) -> None:
        pass

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


def test_cuda_graphs_capture_a_size_in_an_idle_turn_after_its_second_use() -> None:
    pool = FakePool()
    graphs, done = graphs_of(pool)
    assert use(graphs, BUCKET) is None
    assert pool.wanted == []
    assert use(graphs, BUCKET) is None
    assert use(graphs, BUCKET) is None
    assert pool.wanted == [BUCKET]
    assert capture_now(graphs, BUCKET)
    assert done == ["blank", "run"]
    assert graphs.next_of(BUCKET) is None
    assert use(graphs, BUCKET) is not None


def test_cuda_graphs_of_a_busy_model_are_captured_in_place() -> None:
    graphs, _ = graphs_of(FakePool())
    assert [use(graphs, BUCKET) is None for _ in range(EAGER_USES + 1)] == [True] * EAGER_USES + [False]


def test_cuda_graphs_wait_for_room_and_for_weights() -> None:
    pool = FakePool(full=True)
    graphs, done = graphs_of(pool)
    assert all(use(graphs, BUCKET) is None for _ in range(2 * EAGER_USES))
    absent, _ = graphs_of(FakePool(), ready=False)
    assert all(use(absent, BUCKET) is None for _ in range(2 * EAGER_USES))
    assert absent.next_of(BUCKET) is None
    assert done == []


def test_cuda_graphs_try_a_model_that_cannot_be_captured_once(caplog: pytest.LogCaptureFixture) -> None:
    pool = FakePool(fails=True)
    graphs, _ = graphs_of(pool)
    assert all(use(graphs, BUCKET) is None for _ in range(3 * EAGER_USES))
    assert not capture_now(graphs, Bucket(8, 8, 1, 1024))
    assert pool.recorded == 1
    assert "model tiny runs without CUDA graphs" in caplog.text


def test_record_waits_for_weights_that_another_rank_has_already() -> None:
    ready = [False]
    pool = FakePool(collective=True, settle=lambda: ready.__setitem__(0, True))
    graphs = ModelGraphs("tiny", cast("GraphPool", pool), lambda: None, lambda _: torch.zeros(0), lambda: ready[0])
    assert capture_now(graphs, BUCKET)
    assert pool.recorded == 1


def test_record_is_left_out_while_weights_are_absent(caplog: pytest.LogCaptureFixture) -> None:
    ready = [False]
    pool = FakePool(collective=True)
    graphs = ModelGraphs("tiny", cast("GraphPool", pool), lambda: None, lambda _: torch.zeros(0), lambda: ready[0])
    assert not capture_now(graphs, BUCKET)
    assert pool.recorded == 0
    ready[0] = True
    assert capture_now(graphs, BUCKET), "a later capture of the same model is not refused"
    assert not caplog.records


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
        assert bucket_of(bucket.num_tokens, bucket.num_rows, bucket.num_rows, bucket.max_query_len, 1000) == bucket


@pytest.mark.parametrize("tokens", [1, 40, 100, 256, 384])
def test_cuda_graphs_of_a_single_request_come_first(tokens: int) -> None:
    buckets = standard()
    assert bucket_of(tokens, 1, 1, tokens, 400) in buckets[:8]


def idle_pool(limit_bytes: int = 1000) -> GraphPool:
    """A pool without a device; every graph takes 100 bytes."""
    pool = GraphPool(torch.device("cpu"), enabled=False, limit_bytes=limit_bytes)
    pool.enabled = True

    def record(run: Callable[[], torch.Tensor]) -> StepGraph:
        pool.used_bytes += 100
        return StepGraph(cast("torch.cuda.CUDAGraph", None), run(), driver_bytes=90)

    pool.record = record  # type: ignore[method-assign]
    return pool


def member(
    pool: GraphPool, log: list[str], name: str, *likely: Bucket, ready: Callable[[], bool] = lambda: True
) -> ModelGraphs:
    def run(bucket: Bucket) -> torch.Tensor:
        log.append(f"{name}{bucket.num_rows}")
        return torch.zeros(0)

    return ModelGraphs(name, pool, lambda: None, run, ready, likely)


def test_idle_turns_capture_what_is_likely_model_by_model_one_thing_a_turn() -> None:
    log: list[str] = []
    pool = idle_pool()
    buckets = [Bucket(n, n, 1, 1024) for n in (1, 2, 4)]
    a, b = member(pool, log, "a", *buckets), member(pool, log, "b", *buckets[:2])
    members = {"a": a, "b": b}
    for _ in range(2):
        assert capture_next(pool, members)
    assert (a.num_graphs, b.num_graphs, log) == (1, 0, ["a1", "a1"])  # once to wake what it needs, once captured
    while capture_next(pool, members):
        assert abs(a.num_graphs - b.num_graphs) <= 1
    assert (a.num_graphs, b.num_graphs) == (3, 2)


def test_cuda_graphs_capture_asked_sizes_before_likely_ones() -> None:
    log: list[str] = []
    pool = idle_pool()
    graphs = member(pool, log, "a", Bucket(1, 1, 1, 1024))
    asked = Bucket(96, 96, 1, 4096)
    for _ in range(2):
        use(graphs, asked)
    capture_next(pool, {"a": graphs})
    assert log == ["a96"]


def test_likely_graphs_leave_half_of_the_memory_to_those_asked_for() -> None:
    pool = idle_pool(limit_bytes=1000)
    graphs = member(pool, [], "a", *(Bucket(n, n, 1, 1024) for n in range(1, 20)))
    capture_all(pool, {"a": graphs})
    assert graphs.num_graphs == 5
    asked = Bucket(96, 96, 1, 4096)
    for _ in range(2):
        use(graphs, asked)
    capture_all(pool, {"a": graphs})
    assert use(graphs, asked) is not None


def test_cuda_graphs_of_an_evicted_model_are_captured_after_its_return() -> None:
    here: list[bool] = []
    pool = idle_pool()
    graphs = member(pool, [], "a", Bucket(1, 1, 1, 1024), ready=lambda: bool(here))
    assert pool.next_capture() is None
    here.append(True)
    capture_all(pool, {"a": graphs})
    assert graphs.num_graphs == 1
    more = member(pool, [], "b", Bucket(1, 1, 1, 1024))
    pool.forget(more)
    assert pool.next_capture() is None


def test_cuda_graphs_of_an_unloaded_model_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come and go for as long as an engine lives."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    pool = idle_pool(limit_bytes=800)
    for turn in range(12):
        graphs = member(pool, [], f"model {turn}", Bucket(1, 1, 1, 1024), Bucket(2, 2, 1, 1024))
        capture_all(pool, {f"model {turn}": graphs})
        assert graphs.num_graphs == 2
        graphs.close()
        # what the pool itself holds is used again
        assert pool.used_bytes == 20 * (turn + 1)


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
    for number, model in enumerate(models):
        shared = drivers[0].state if drivers else None
        drivers.append(Driver(*hooked(model, device="cuda"), seed=3, state=shared, model_id=f"m{number}"))
    for _ in range(2):  # the second round replays what idle turns captured after the first
        for driver, expected in zip(drivers, eager, strict=True):
            assert [a.tokens for a in driver.run(asks)] == [a.tokens for a in expected]
        capture_all(drivers[0].state.graphs, {f"m{number}": each.runner for number, each in enumerate(drivers)})
    pool = drivers[0].state.graphs
    used_bytes = pool.used_bytes
    assert used_bytes > 0
    for driver in drivers:
        driver.runner.close()
    assert 0 <= pool.used_bytes <= used_bytes


@pytest.mark.gpu
def test_cuda_graphs_of_others_survive_a_model_that_synchronises(caplog: pytest.LogCaptureFixture) -> None:
    """A capture that the driver calls void: torch must not take the next one for a second capture at once."""
    device = torch.device("cuda", 0)
    pool = GraphPool(device, enabled=True)
    out = torch.zeros(8, device=device)

    def asks(bucket: Bucket) -> torch.Tensor:
        return out[: bucket.num_rows] + float(out.sum())

    refused = ModelGraphs("asks", pool, lambda: None, asks, lambda: True)
    others = [
        ModelGraphs(name, pool, lambda: None, lambda bucket: out[: bucket.num_rows] + 1, lambda: True) for name in "ab"
    ]
    assert capture_now(others[0], BUCKET)
    assert not capture_now(refused, BUCKET)
    assert "model asks runs without CUDA graphs" in caplog.text
    assert capture_now(others[1], BUCKET)
    out.fill_(2)
    for graphs in others:
        graph = use(graphs, BUCKET)
        assert graph is not None
        graph.graph.replay()
        assert graph.logits.tolist() == [3, 3, 3, 3]
    torch.cuda.empty_cache()  # refused while torch believes in a capture under way
    for graphs in (*others, refused):
        graphs.close()
