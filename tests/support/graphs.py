"""Captures and uses CUDA graphs as the engine's executor does, without an engine."""

from collections.abc import Mapping
from typing import Protocol

from runtime.engine.interfaces import Bucket, GraphCapture, Launched, Runner, StepPlan
from runtime.engine.model.run.cuda_graphs import GraphPool, ModelGraphs, StepGraph


class Capturing(Protocol):
    def capture(self, bucket: Bucket, *, record: bool) -> None: ...


class CaptureQueue(Protocol):
    def next_capture(self) -> GraphCapture | None: ...


def capture_next(pool: CaptureQueue, members: Mapping[str, Capturing]) -> bool:
    """Do what an idle turn does for the graphs of the models in `members`, by name. Returns False if there is nothing to do."""
    capture = pool.next_capture()
    if capture is None:
        return False
    members[capture.model_id].capture(capture.bucket, record=capture.record)
    return True


def capture_all(pool: GraphPool, members: Mapping[str, Capturing]) -> None:
    while capture_next(pool, members):
        pass


def capture_now(graphs: ModelGraphs, bucket: Bucket) -> bool:
    """Capture a bucket. Returns whether it has a graph afterwards."""
    for record in (False, True):
        graphs.capture(bucket, record=record)
    return graphs.find(bucket) is not None


def use(graphs: ModelGraphs, bucket: Bucket) -> StepGraph | None:
    """Use a bucket in a step. Returns the graph that the step replays."""
    replay, capture = graphs.choose(bucket)
    if capture is not None and capture_now(graphs, bucket):
        return graphs.find(bucket)
    return None if replay is None else graphs.find(bucket)


def launch(runner: Runner, plan: StepPlan) -> Launched:
    return runner.launch(plan, _padded_to(runner, plan))


def launch_forward(runner: Runner, plan: StepPlan) -> None:
    runner.launch_forward(plan, _padded_to(runner, plan))


def _padded_to(runner: Runner, plan: StepPlan) -> Bucket | None:
    replay, capture = runner.choose_graph(plan)
    if capture is None:
        return replay
    for record in (False, True):
        runner.capture(capture, record=record)
    return capture if runner.has_graph(capture) else None
