"""When a graph is asked for, captured, replayed and released."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from runtime.engine.interfaces import Bucket
from runtime.engine.model.run.buckets import (
    CONTEXT_TOKENS,
    DECODE_ROWS,
    wide,
)
from runtime.engine.model.run.cuda_graphs import COVERED_USES, EAGER_USES, GraphPool, ModelGraphs, StepGraph
from tests.support.driving import Ask, Driver, hooked
from tests.support.families import VOCAB, family
from tests.support.graphs import capture_all, capture_next, capture_now, use


@dataclass
class FakePool:
    """Records without a device."""

    enabled: bool = True
    full: bool = False
    fails: bool = False
    collective: bool = False
    wanted: list[Bucket] = field(default_factory=list)
    recorded: int = 0
    has_spare: bool = True
    settle: Callable[[], None] = lambda: None

    def join(self, graphs: ModelGraphs) -> None:
        pass

    def want(self, graphs: ModelGraphs, bucket: Bucket) -> None:
        self.wanted.append(bucket)

    def has_room(self, graphs: ModelGraphs) -> bool:
        return not self.full

    def make_room(self, graphs: ModelGraphs) -> None:
        pass

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


def test_cuda_graphs_of_steps_with_adapters_take_turns_with_the_others() -> None:
    """The second expectation repeats the first, as that of each further adapter does."""
    plain = [Bucket(rows, rows, 1, 1024) for rows in (1, 2, 4)]
    adapted = [bucket._replace(adapted=True) for bucket in plain]
    graphs = ModelGraphs(
        "tiny", cast("GraphPool", FakePool()), lambda: None, lambda _: torch.zeros(0), lambda: True, plain
    )
    assert graphs.ahead() == plain[0]
    assert capture_now(graphs, plain[0])
    assert graphs.ahead() == plain[1]
    graphs.expect(adapted)
    graphs.expect(adapted)
    order = []
    while (bucket := graphs.ahead()) is not None:
        order.append(bucket)
        assert capture_now(graphs, bucket)
    assert order == [plain[1], adapted[0], plain[2], adapted[1], adapted[2]]


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


def test_step_without_a_graph_runs_in_the_smallest_that_covers_it() -> None:
    graphs, _ = graphs_of(FakePool())
    for rows in (64, 16):
        assert capture_now(graphs, Bucket(rows, rows, 1, 4096))
    assert graphs.choose(Bucket(2, 2, 1, 1024)).replay == Bucket(16, 16, 1, 4096)
    assert graphs.choose(Bucket(24, 24, 1, 4096)).replay == Bucket(64, 64, 1, 4096)
    assert graphs.choose(Bucket(24, 24, 1, 16384)).replay is None
    assert graphs.choose(Bucket(16, 16, 16, CONTEXT_TOKENS[-1])).replay is None


def test_covered_step_gets_a_graph_of_its_own_where_memory_allows() -> None:
    pool = FakePool()
    graphs, _ = graphs_of(pool)
    assert capture_now(graphs, Bucket(16, 16, 1, 4096))
    choices = [graphs.choose(BUCKET) for _ in range(COVERED_USES + 1)]
    assert pool.wanted == [BUCKET]
    assert [choice.capture for choice in choices] == [None] * COVERED_USES + [BUCKET]
    pool.has_spare = False
    assert all(graphs.choose(BUCKET).capture is None for _ in range(2 * COVERED_USES))


def test_wide_graph_is_captured_where_memory_is_short() -> None:
    pool = FakePool(has_spare=False)
    graphs, _ = graphs_of(pool)
    steps = [Bucket(rows, rows, 1, 1024) for rows in DECODE_ROWS[: EAGER_USES + 1]]
    choices = [graphs.choose(step, wide(step)) for step in steps]
    assert [choice.capture for choice in choices] == [None] * EAGER_USES + [Bucket(16, 16, 1, 4096)]
    assert pool.wanted == [Bucket(16, 16, 1, 4096)]


def test_full_pool_takes_graphs_from_the_model_with_the_most() -> None:
    log: list[str] = []
    pool = idle_pool(limit_bytes=1000)
    rich, poor = member(pool, log, "rich"), member(pool, log, "poor")
    sizes = [Bucket(rows, rows, 1, 65536) for rows in range(100, 112)]
    for bucket in sizes:
        capture_now(rich, bucket)
    assert rich.num_graphs == 10
    rich.choose(sizes[0])  # The next one is now the least recently used.
    for bucket in sizes:
        capture_now(poor, bucket)
    assert abs(rich.num_graphs - poor.num_graphs) <= 1
    assert rich.find(sizes[0]) is not None
    assert rich.find(sizes[1]) is None
    assert pool.used_bytes <= 1000 + 10 * (rich.num_graphs + poor.num_graphs)


def test_stopped_pool_captures_nothing() -> None:
    pool = idle_pool()
    rich, poor = member(pool, [], "rich"), member(pool, [], "poor")
    for rows in range(1, 5):
        capture_now(rich, Bucket(rows, rows, 1, 65536))
    pool.stop()
    assert poor.next_of(BUCKET) is None
    assert rich.num_graphs == 4


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
    pool: GraphPool,
    log: list[str],
    name: str,
    *likely: Bucket,
    ready: Callable[[], bool] = lambda: True,
    compiled: Callable[[Bucket], bool] = lambda bucket: True,
) -> ModelGraphs:
    def run(bucket: Bucket) -> torch.Tensor:
        log.append(f"{name}{bucket.num_rows}")
        return torch.zeros(0)

    return ModelGraphs(name, pool, lambda: None, run, ready, likely, compiled)


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


def test_idle_turns_capture_sizes_whose_kernels_are_compiled_beside_a_warmup() -> None:
    """A size that a step requested waits for its kernels, and keeps no other from being captured."""
    compiled: set[Bucket] = set()
    log: list[str] = []
    pool = idle_pool()
    small, large, asked = (Bucket(rows, rows, 1, 1024) for rows in (1, 32, 96))
    graphs = member(pool, log, "a", small, large, compiled=compiled.__contains__)
    for _ in range(2):
        use(graphs, asked)
    capture_all(pool, {"a": graphs})
    assert log == []
    for bucket, name in ((large, "a32"), (asked, "a96"), (small, "a1")):
        compiled.add(bucket)
        capture_all(pool, {"a": graphs})
        assert log == [name, name]
        log.clear()
    assert graphs.num_graphs == 3


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


@pytest.mark.gpu
def test_graph_that_is_released_while_it_runs_ends_its_work() -> None:
    device = torch.device("cuda", 0)
    pool = GraphPool(device, enabled=True)
    out = torch.zeros(1 << 24, device=device)

    def adds(bucket: Bucket) -> torch.Tensor:
        for _ in range(100):
            out.add_(bucket.num_rows)
        return out[: bucket.num_rows]

    graphs = ModelGraphs("adds", pool, lambda: None, adds, lambda: True)
    sizes = [Bucket(rows, rows, 1, 65536) for rows in (1, 2)]
    assert all(capture_now(graphs, bucket) for bucket in sizes)
    torch.cuda.synchronize()
    out.zero_()
    for bucket in sizes:
        assert graphs.choose(bucket).replay == bucket
        graphs.run(bucket)
    graphs.release_oldest()
    assert graphs.find(sizes[0]) is None
    assert graphs.num_graphs == 1
    graphs.run(sizes[1])
    assert out[-1].item() == 100 * (1 + 2 + 2)
    graphs.close()
