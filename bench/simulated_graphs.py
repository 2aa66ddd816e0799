"""CUDA graphs in virtual time, with the engine's own choice of what is captured, replayed and released: a capture takes two passes in Python."""

from collections.abc import Callable
from typing import cast

import torch

from bench.checkpoints import Shape
from common.units import MIB
from runtime.engine.interfaces import Bucket, GraphChoice, StepPlan
from runtime.engine.model.run.buckets import bucket_of, standard, wide
from runtime.engine.model.run.cuda_graphs import GraphPool, ModelGraphs, StepGraph

# docs/benchmarks/served.md: 38 graphs of 32 layers took 688 MiB; a layer takes 0.4 to 0.8 ms of Python
_GRAPH_BYTES_PER_LAYER = 18 * MIB // 32
_PYTHON_S_PER_LAYER = 0.5e-3
_MAX_TOKENS = 8192  # of a step


def python_s(shape: Shape) -> float:
    """Return how long the engine's thread takes to launch a pass without a graph."""
    return shape.layers * _PYTHON_S_PER_LAYER


class SimulatedGraphPool(GraphPool):
    """A pool whose graphs take as much memory as on a GPU, and replay nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), enabled=False)
        self.enabled = True

    def settle(self) -> None:
        """Wait for nothing: a capture has ended when it returns."""

    def record(self, run: Callable[[], torch.Tensor]) -> StepGraph:
        layers = run()
        num_bytes = int(layers) * _GRAPH_BYTES_PER_LAYER
        self.used_bytes += num_bytes
        return StepGraph(cast("torch.cuda.CUDAGraph", None), layers, num_bytes)


class SimulatedGraphs:
    """One model's graphs. `wait`: lets time pass."""

    def __init__(
        self,
        model_id: str,
        shape: Shape,
        pool: GraphPool,
        max_rows: int,
        wait: Callable[[float], None],
        ready: Callable[[], bool],
    ) -> None:
        def run(bucket: Bucket) -> torch.Tensor:
            del bucket
            wait(python_s(shape))
            return torch.tensor(shape.layers)

        likely = tuple(dict.fromkeys(bucket.within(max_rows, _MAX_TOKENS) for bucket in standard()))
        self._max_rows = max_rows
        self._graphs = ModelGraphs(model_id, pool, lambda: None, run, ready, likely)

    def choose(self, plan: StepPlan) -> GraphChoice:
        longest = max(map(int.__add__, plan.starts, plan.counts))
        bucket = bucket_of(plan.num_tokens, len(plan.counts), sum(plan.samples), max(plan.counts), longest)
        if bucket is None:
            return GraphChoice()
        return self._graphs.choose(
            bucket.within(self._max_rows, _MAX_TOKENS), wide(bucket).within(self._max_rows, _MAX_TOKENS)
        )

    def has(self, bucket: Bucket) -> bool:
        return self._graphs.find(bucket) is not None

    def capture(self, bucket: Bucket, *, record: bool) -> None:
        self._graphs.capture(bucket, record=record)
