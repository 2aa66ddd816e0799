"""The pool that all models' graphs share, over a stand-in for torch's captures: one model's failure is no other's."""

import gc
from collections.abc import Callable

import pytest
import torch

from common.units import MIB
from runtime.engine.interfaces import Bucket
from runtime.engine.model.run.cuda_graphs import EAGER_USES, GraphPool, ModelGraphs
from tests.support.graphs import capture_all, capture_now, use
from tests.support.torch_graphs import TorchGraphs

BUCKET = Bucket(4, 4, 1, 1024)
OTHER = Bucket(8, 8, 1, 1024)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> TorchGraphs:
    made = TorchGraphs()
    made.install(monkeypatch)
    return made


@pytest.fixture
def pool(captures: TorchGraphs) -> GraphPool:
    return GraphPool(torch.device("cpu"), enabled=True)


def graphs_of(pool: GraphPool, run: Callable[[], object] = lambda: None, name: str = "a") -> ModelGraphs:
    def logits(bucket: Bucket) -> torch.Tensor:
        run()
        return torch.zeros(bucket.num_rows)

    return ModelGraphs(name, pool, lambda: None, logits, lambda: True, (BUCKET,))


def test_graph_pool_keeps_graphs_beside_a_model_that_cannot_be_captured(
    captures: TorchGraphs, pool: GraphPool, caplog: pytest.LogCaptureFixture
) -> None:
    before = graphs_of(pool)
    assert capture_now(before, BUCKET)
    for name in ("asks the device", "asks it too"):
        refused = graphs_of(pool, captures.void, name)
        assert not capture_now(refused, BUCKET)
        assert f"model {name} runs without CUDA graphs: operation not permitted" in caplog.text
        assert not captures.recording, "torch frees nothing while it believes that a capture is under way"
        refused.close()
    after = graphs_of(pool)
    assert capture_now(before, OTHER)
    assert capture_now(after, BUCKET)
    before.close()
    after.close()
    gc.collect()
    # what the failed captures used goes with the last graph there
    assert sum(captures.users.values()) == 1, "only the pool in use is kept"


@pytest.mark.parametrize(
    "error", [ValueError("a pointer that the driver does not know"), KeyError("x"), torch.OutOfMemoryError("no room")]
)
@pytest.mark.parametrize("fails_at", ["warmup", "capture"])
@pytest.mark.parametrize("asked", ["by an idle turn", "by a step"])
def test_graph_pool_survives_any_error_of_a_capture(
    captures: TorchGraphs, pool: GraphPool, error: Exception, fails_at: str, asked: str
) -> None:
    def run() -> None:
        if (captures.capturing is not None) == (fails_at == "capture"):
            raise error

    graphs = graphs_of(pool, run)
    if asked == "by a step":
        assert [use(graphs, BUCKET) for _ in range(EAGER_USES + 2)] == [None] * (EAGER_USES + 2)
    else:
        capture_all(pool, {"a": graphs})
    assert graphs.num_graphs == 0
    assert not captures.recording
    assert pool.full == isinstance(error, torch.OutOfMemoryError)
    if not pool.full:
        assert capture_now(graphs_of(pool), BUCKET)


def test_graph_pool_counts_no_memory_of_other_threads(captures: TorchGraphs, pool: GraphPool) -> None:
    """A warmup allocates activations while an idle turn captures."""

    def run() -> None:
        if captures.capturing is not None:
            captures.allocate(300 * MIB)  # by another thread
            captures.allocate(6 * MIB, pooled=6 * MIB)
            captures.free_bytes -= 18 * MIB  # the driver's own

    graphs = graphs_of(pool, run)
    assert capture_now(graphs, BUCKET)
    assert pool.used_bytes == 24 * MIB
    graphs.close()
    assert pool.used_bytes == 6 * MIB, "the pool keeps its memory"


def test_failed_pass_of_a_group_of_ranks_is_raised(captures: TorchGraphs) -> None:
    """The other ranks wait in the pass, so the engine has to end."""

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    group = GraphPool(torch.device("cpu"), enabled=True, collective=True)
    with pytest.raises(torch.OutOfMemoryError):
        capture_now(graphs_of(group, fail), BUCKET)
