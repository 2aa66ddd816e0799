"""Device operations: a recorded run replays on a second backend, and failures stay with their model."""

from collections import Counter

import msgspec
import pytest

from runtime.engine.core.executor import OperationExecutor
from runtime.engine.interfaces import Bucket, GraphCapture
from runtime.engine.operations import (
    CaptureGraph,
    CloseRow,
    DropHost,
    Evict,
    FinishLoad,
    MapHostKv,
    MapKv,
    OpenRow,
    Operation,
    RestoreKv,
    RunStep,
    SaveKv,
    StartLoad,
    SwapIn,
    SwapInAdapter,
    Unload,
    UnmapHostKv,
    UnmapKv,
)
from runtime.errors import LoadFailed
from runtime.types import Checkpoint, FinishReason
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec
from tests.support.random_life import run_life


class Recorder:
    """Keeps operations as encoded bytes, and the backend's state at every 25th turn."""

    def __init__(self) -> None:
        self.log: list[bytes] = []
        self.states: dict[int, list[object]] = {}  # operations applied so far → state
        self._turns = 0

    def record(self, operation: Operation) -> None:
        self.log.append(msgspec.msgpack.encode(operation))

    def on_turn(self, backend: FakeBackend) -> None:
        self._turns += 1
        if self._turns % 25 == 0:
            self.states[len(self.log)] = backend.snapshot()


def replay(recorder: Recorder, backend: FakeBackend) -> list[Operation]:
    """Apply the recorded operations and compare the states on the way."""
    decoder: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
    executor = OperationExecutor(backend)
    operations = [decoder.decode(data) for data in recorder.log]
    for count, operation in enumerate(operations, 1):
        try:
            launched = executor.apply(operation)
        except LoadFailed:
            continue  # the recorded load failed likewise
        if launched is not None:
            launched.collect()
        if count in recorder.states:
            assert backend.snapshot() == recorder.states[count]
    return operations


# lives with preemption, aborts, eviction and return, the last two with KV that is saved and restored
@pytest.mark.parametrize(("seed", "host_kv_slabs"), [(8, 0), (4, 3), (1, 12)])
def test_executor_replays_a_recorded_life(seed: int, host_kv_slabs: int) -> None:
    recorder = Recorder()
    stage = run_life(
        seed, 300, faults=False, host_kv_slabs=host_kv_slabs, record=recorder.record, on_turn=recorder.on_turn
    )
    assert sum(model.preemptions_total for model in stage.stats().models) > 0
    assert any(answer.finish is FinishReason.ABORTED for answer in stage.answers.values())
    stage.close()
    first = stage.backend
    second = FakeBackend(
        first.specs,
        total_slabs=first.total_slabs,
        max_rows=first.max_rows,
        max_batch_tokens=first.max_batch_tokens,
        host_kv_slabs=host_kv_slabs,
    )
    operations = replay(recorder, second)
    assert second.results == first.results
    assert second.snapshot() == first.snapshot()
    assert not second.broken_rules
    assert len(recorder.states) > 5
    kinds = Counter(type(operation) for operation in operations)
    assert kinds.keys() >= {StartLoad, FinishLoad, Unload, SwapIn, Evict, MapKv, UnmapKv, OpenRow, CloseRow, RunStep}
    assert kinds[SwapIn] > kinds[FinishLoad]
    assert bool(host_kv_slabs) == (kinds.keys() >= {MapHostKv, SaveKv, RestoreKv, UnmapHostKv})


def test_executor_replay_waits_for_the_copies_of_adapters() -> None:
    """Planning polls the copies of rank 0 only. On another rank a step may come before its adapter has arrived."""
    recorder = Recorder()
    stage = run_life(3, 200, adapters=True, faults=False, record=recorder.record, on_turn=recorder.on_turn)
    stage.close()
    first = stage.backend
    second = FakeBackend(
        first.specs, total_slabs=first.total_slabs, max_rows=first.max_rows, max_batch_tokens=first.max_batch_tokens
    )
    second.adapters, second.adapter_slots = first.adapters, first.adapter_slots
    operations = replay(recorder, second)
    assert sum(isinstance(operation, SwapInAdapter) for operation in operations) > 3
    assert sum(isinstance(operation, RunStep) and bool(operation.plan.adapters) for operation in operations) > 20
    assert second.results == first.results
    assert not second.broken_rules


def test_executor_replay_without_one_operation_differs() -> None:
    recorder = Recorder()
    stage = run_life(3, 300, faults=False, record=recorder.record, on_turn=recorder.on_turn)
    stage.close()
    opened = next(i for i, data in enumerate(recorder.log) if b"open_row" in data)
    del recorder.log[opened]
    with pytest.raises((AssertionError, KeyError)):
        replay(
            recorder,
            FakeBackend(stage.backend.specs, total_slabs=stage.backend.total_slabs, max_rows=stage.backend.max_rows),
        )


def loaded(backend: FakeBackend, *model_ids: str) -> OperationExecutor:
    executor = OperationExecutor(backend)
    for model_id in model_ids:
        executor.start_load(StartLoad(model_id, Checkpoint(model_dir=model_id)))
        executor.finish_load(model_id)
    return executor


def test_executor_enqueue_touches_no_device() -> None:
    backend = FakeBackend({"a": FakeSpec()})
    executor = loaded(backend, "a")
    executor.enqueue(SwapIn("a", (0, 1, 2, 3)))
    assert backend.mapped == 0
    executor.flush()
    assert backend.mapped == 4


def test_executor_failed_swap_in_leaves_other_models_alone() -> None:
    backend = FakeBackend({"a": FakeSpec(), "b": FakeSpec()})
    executor = loaded(backend, "a", "b")
    backend.broken_swap_ins["a"] = True
    executor.enqueue(SwapIn("a", (0, 1, 2, 3)))
    executor.enqueue(SwapIn("b", (4, 5, 6, 7)))
    executor.flush()
    assert backend.mapped == 4
    failed = executor.take_failed_swap_ins()
    assert list(failed) == ["a"]
    assert isinstance(failed["a"], OSError)
    assert not executor.take_failed_swap_ins()


def test_executor_flush_raises_what_no_model_can_be_blamed_for() -> None:
    backend = FakeBackend({"a": FakeSpec()})
    executor = loaded(backend, "a")
    executor.enqueue(MapKv("a", 0, 99))  # there are 32 slabs
    with pytest.raises(AssertionError):
        executor.flush()


def test_executor_captures_by_operations_and_names_the_model_of_a_lost_device() -> None:
    """A rank that applies the recorded operations captures the same graphs."""
    backend, recorder, marks = FakeBackend({"a": FakeSpec()}), Recorder(), list[str]()
    executor = OperationExecutor(backend, marks.append, recorder.record)
    executor.start_load(StartLoad("a", Checkpoint(model_dir="a")))
    executor.finish_load("a")
    due = [GraphCapture("a", Bucket(1, 1, 1, 1024), record) for record in (False, True)]
    backend.captures = [*due, due[0]]
    assert executor.run_idle_work()
    assert executor.run_idle_work()
    second = FakeBackend(backend.specs)
    replay(recorder, second)
    assert backend.captured == second.captured == due
    backend.lost = True
    marks.clear()
    with pytest.raises(RuntimeError, match="lost"):
        executor.run_idle_work()
    assert marks == ["a"]


@pytest.mark.parametrize(
    "operation",
    [
        CaptureGraph("a", Bucket(4, 4, 1, 1024, adapted=True), record=True),
        DropHost("a"),
        SaveKv("a", ((3, 4), (5, 6))),
        MapKv("a", 3, 4),
        CloseRow("a", 2),
        SwapIn("a", (1, 2)),
        StartLoad("a", Checkpoint("d")),
    ],
)
def test_operation_survives_encoding(operation: Operation) -> None:
    data = msgspec.json.encode(operation)
    assert msgspec.json.decode(data, type=Operation) == operation
