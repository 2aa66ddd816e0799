"""Applies device operations to a backend in the order in which planning enqueued them.

The executor is the only code that changes the device and the only owner of the crash marker.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from runtime.engine.grammar.interfaces import TokenMasks, mask_words
from runtime.engine.interfaces import (
    AdapterBank,
    AdapterJob,
    AdapterResult,
    Backend,
    Bucket,
    Launched,
    LoadJob,
    LoadRequest,
    LoadResult,
    RowSetup,
    StepPlan,
)
from runtime.engine.operations import (
    CancelLoad,
    CaptureGraph,
    CloseRow,
    CommitSlabs,
    DecommitSlabs,
    DropHost,
    Evict,
    EvictAdapter,
    FinishLoad,
    MapAdapters,
    MapHostKv,
    MapKv,
    OpenRow,
    Operation,
    RestoreKv,
    RunDraws,
    RunForward,
    RunStep,
    SaveKv,
    StartLoad,
    SwapIn,
    SwapInAdapter,
    Unload,
    UnmapAdapters,
    UnmapHostKv,
    UnmapKv,
)
from runtime.errors import RepertoryError


class OperationExecutor:
    """Queues operations and applies them.

    Args:
        mark: records the model whose device work starts now, to attribute a crash; "" for no model.
        record: is called with each operation before it is applied.
        settle: waits until the other ranks of a tensor-parallel engine have finished the load of a model, or a change of the committed slabs (""), and
            returns the first error among them.
    """

    def __init__(
        self,
        backend: Backend,
        mark: Callable[[str], None] = lambda model_id: None,
        record: Callable[[Operation], None] | None = None,
        settle: Callable[[str], RepertoryError | None] = lambda model_id: None,
    ) -> None:
        self._backend = backend
        self._mark = mark
        self._record = record
        self._settle = settle
        self._queue: list[Operation] = []
        self._jobs: dict[str, LoadJob] = {}
        self._models: dict[str, LoadResult] = {}
        self._adapter_jobs: dict[str, AdapterJob] = {}
        self._adapters: dict[str, AdapterResult] = {}
        self._bases: dict[str, str] = {}  # of adapters
        self._arriving: dict[
            tuple[str, int], str
        ] = {}  # (base, slot) → the adapter, until the first step that uses it there
        self._failed_swap_ins: dict[str, Exception] = {}

    def enqueue(self, operation: Operation) -> None:
        """Add an operation that the next `flush` or `launch` applies. Touches no device."""
        self._queue.append(operation)

    def flush(self) -> None:
        """Apply what is queued.

        A SwapIn that fails is kept for `take_failed_swap_ins` and does not stop the operations after it. Any other error is raised.
        """
        if not self._queue:
            return
        queue, self._queue = self._queue, []
        for operation in queue:
            if isinstance(operation, SwapIn | SwapInAdapter):
                try:
                    self.apply(operation)
                except Exception as error:
                    self._failed_swap_ins[operation.model_id] = error
            elif isinstance(operation, DecommitSlabs):
                self._decommit(operation)
            else:
                self.apply(operation)

    def launch(self, model_id: str, opened: Iterable[RowSetup], plan: StepPlan) -> Launched:
        """Open the rows that `plan` needs and launch it, after everything that is queued. Raises what the device raises."""
        self._open(model_id, opened)
        padded_to = self._choose_graph(model_id, plan)
        if self._record is not None:
            self._record(RunStep(model_id, plan, padded_to))
        return self._models[model_id].runner.launch(plan, padded_to)

    def launch_forward(self, model_id: str, opened: Iterable[RowSetup], plan: StepPlan) -> None:
        """Launch a step without its draws: `launch_draws` must be the next call."""
        self._open(model_id, opened)
        padded_to = self._choose_graph(model_id, plan)
        if self._record is not None:
            self._record(RunForward(model_id, plan, padded_to))
        self._models[model_id].runner.launch_forward(plan, padded_to)

    def mask_lines(self, model_id: str, count: int) -> TokenMasks:
        """Return memory for the masks of a model's next draws, when those before have been collected."""
        return self._models[model_id].runner.mask_lines(count)

    def launch_draws(self, model_id: str, masks: TokenMasks) -> Launched:
        """Launch the draws of the last forward pass. `masks` has one line per masked row of its plan."""
        if self._record is not None:
            self._record(RunDraws(model_id, masks.tobytes()))
        return self._models[model_id].runner.launch_draws(masks)

    def _open(self, model_id: str, opened: Iterable[RowSetup]) -> None:
        self.flush()
        self._mark(model_id)
        for setup in opened:
            self.apply(OpenRow(model_id, setup))

    def _choose_graph(self, model_id: str, plan: StepPlan) -> Bucket | None:
        """Return the bucket to which the step is padded, None = it runs without a graph. Captures the graph if that is due."""
        runner = self._models[model_id].runner
        replay, capture = runner.choose_graph(plan)
        if capture is None:
            return replay
        for record in (False, True):
            self.apply(CaptureGraph(model_id, capture, record))
        return capture if runner.has_graph(capture) else None

    def start_load(self, request: StartLoad) -> None:
        """Apply what is queued, then begin to load a model."""
        self.enqueue(request)
        self.flush()

    @property
    def num_loading(self) -> int:
        """Loads that were started and not finished."""
        return len(self._jobs) + len(self._adapter_jobs)

    def load_is_done(self, model_id: str) -> bool:
        """Whether `finish_load` would return at once."""
        return self._job(model_id).done()

    def cancel_load(self, model_id: str) -> None:
        """Stop a load as soon as possible; `finish_load` must still be called."""
        self.enqueue(CancelLoad(model_id))
        self.flush()

    def finish_load(self, model_id: str) -> LoadResult:
        """Wait for a load and return its model, which must be unloaded later. Raises the load's RepertoryError.

        The model is on all ranks or on none.
        """
        self._finish(model_id)
        return self._models[model_id]

    def finish_adapter_load(self, model_id: str) -> AdapterResult:
        """Finish the load of an adapter, as `finish_load` does for a model."""
        self._finish(model_id)
        return self._adapters[model_id]

    def _finish(self, model_id: str) -> None:
        self.flush()
        error: BaseException | None = None
        try:
            self.apply(FinishLoad(model_id))
        except Exception as raised:
            error = raised
        remote = self._settle(model_id)
        error = error or remote
        if error is not None:
            self.unload(model_id)
            raise error

    def commit(self, slabs: Sequence[int]) -> Exception | None:
        """Take memory for slabs on all ranks. Returns the error if one has too little, and then none has taken any."""
        self.flush()
        error: Exception | None = None
        try:
            self.apply(CommitSlabs(tuple(slabs)))
        except Exception as raised:
            error = raised
        error = self._settle("") or error
        if error is not None:
            self._decommit(DecommitSlabs(tuple(slabs)))
        return error

    def _decommit(self, operation: DecommitSlabs) -> None:
        """Give memory back. On return, other processes can have it."""
        self.apply(operation)
        error = self._settle("")
        if error is not None:
            raise error

    def unload(self, model_id: str) -> None:
        """Apply what is queued, then close a model or an adapter."""
        self.enqueue(Unload(model_id))
        self.flush()
        self._failed_swap_ins.pop(model_id, None)

    def expect_adapters(self, model_id: str) -> None:
        """Have a model prepare for steps with adapters."""
        self._models[model_id].runner.expect_adapters()

    def take_failed_swap_ins(self) -> dict[str, Exception]:
        """Return the models whose swap-in failed since the last call. Each holds its slabs until it is evicted."""
        failed, self._failed_swap_ins = self._failed_swap_ins, {}
        return failed

    def take_failed_swap_in(self, model_id: str) -> Exception | None:
        """Return the error of a swap-in of one model that failed since the last call; None if none did."""
        return self._failed_swap_ins.pop(model_id, None)

    def mark_running(self, model_id: str) -> None:
        """Note which model a crash from now on must be attributed to; "" for none."""
        self._mark(model_id)

    def is_prepared(self, model_id: str) -> bool:
        """Return whether idle work has done for a model what speeds up its first request."""
        return self._models[model_id].runner.is_prepared()

    def run_idle_work(self, *, may_capture: bool = True) -> bool:
        """Do one piece of the backend's background work. Returns whether there was one."""
        capture = self._backend.next_capture() if may_capture else None
        if capture is not None:
            self.apply(CaptureGraph(*capture))
            self._backend.settle()
            return True
        return self._backend.idle(self._mark)

    def apply(self, operation: Operation) -> Launched | None:
        """Apply one operation now, ahead of the queue. Returns the launched step for a RunStep and a RunDraws."""
        if self._record is not None:
            self._record(operation)
        match operation:
            case CloseRow(model_id, row):
                self._models[model_id].runner.close_row(row)
            case OpenRow(model_id, setup):
                self._models[model_id].runner.open_row(setup)
            case MapKv(model_id, index, slab):
                self._models[model_id].memory.map_kv(index, slab)
            case UnmapKv(model_id, index):
                self._models[model_id].memory.unmap_kv(index)
            case SaveKv(model_id, blocks):
                self._models[model_id].memory.host_kv.save(blocks)
            case RestoreKv(model_id, blocks):
                self._models[model_id].memory.host_kv.restore(blocks)
            case MapHostKv(model_id, index):
                self._models[model_id].memory.host_kv.map(index)
            case UnmapHostKv(model_id, index):
                self._models[model_id].memory.host_kv.unmap(index)
            case SwapIn(model_id, slabs):
                self._mark(model_id)
                self._models[model_id].memory.swap_in(slabs)
            case Evict(model_id):
                self._models[model_id].memory.evict()
            case DropHost(model_id) if model_id in self._adapters:
                self._adapters[model_id].memory.drop_host()
            case DropHost(model_id):
                self._models[model_id].memory.drop_host()
            case CommitSlabs(slabs):
                self._backend.commit_slabs(slabs)
            case DecommitSlabs(slabs):
                self._backend.decommit_slabs(slabs)
            case CaptureGraph(model_id, bucket, record):
                self._mark(model_id)
                self._models[model_id].runner.capture(bucket, record=record)
            case RunStep(model_id, plan, padded_to):
                self._mark(model_id)
                self._await_adapters(model_id, plan)
                return self._models[model_id].runner.launch(plan, padded_to)
            case RunForward(model_id, plan, padded_to):
                self._mark(model_id)
                self._await_adapters(model_id, plan)
                self._models[model_id].runner.launch_forward(plan, padded_to)
            case RunDraws(model_id, masks):
                runner = self._models[model_id].runner
                # The runner may change them, as on rank 0.
                words = np.frombuffer(bytearray(masks), np.int32).reshape(-1, mask_words(runner.facts.vocab_size))
                return runner.launch_draws(words)
            case MapAdapters(model_id, index, slab):
                self._bank(model_id).map(index, slab)
            case UnmapAdapters(model_id, index):
                self._bank(model_id).unmap(index)
            case SwapInAdapter(model_id, slot, offset):
                self._arriving[self._bases[model_id], slot] = model_id
                self._adapters[model_id].memory.swap_in(slot, offset)
            case EvictAdapter(model_id):
                self._forget_arrival(model_id)
                self._adapters[model_id].memory.evict()
            case _:
                self._apply_load(operation)
        return None

    def _apply_load(self, operation: Operation) -> None:
        match operation:
            case StartLoad(model_id, checkpoint, max_model_len, ""):
                self._jobs[model_id] = self._backend.load(LoadRequest(model_id, checkpoint, max_model_len))
            case StartLoad(model_id, checkpoint, max_model_len, base_id):
                base, request = self._models[base_id], LoadRequest(model_id, checkpoint, max_model_len)
                self._adapter_jobs[model_id] = self._backend.load_adapter(request, base)
                self._bases[model_id] = base_id
            case CancelLoad(model_id):
                self._job(model_id).cancel()
            case FinishLoad(model_id) if model_id in self._adapter_jobs:
                self._adapters[model_id] = self._adapter_jobs.pop(model_id).result()
            case FinishLoad(model_id):
                self._models[model_id] = self._jobs.pop(model_id).result()
            case Unload(model_id) if model_id in self._adapters:
                self._forget_arrival(model_id)
                del self._bases[model_id]
                self._adapters.pop(model_id).memory.close()
            case Unload(model_id):
                self._bases.pop(model_id, None)
                model = self._models.pop(model_id, None)
                if model is not None:  # else its load failed on this rank
                    model.runner.close()
                    model.memory.close()
                    if model.adapters is not None:
                        model.adapters.close()

    def _await_adapters(self, model_id: str, plan: StepPlan) -> None:
        """Have a step wait for its adapters. Planning waits for those of its own rank; copies on other ranks may take longer."""
        if not self._arriving or not plan.adapters:
            return
        for slot in set(plan.adapters):
            adapter_id = self._arriving.pop((model_id, slot), None)
            if adapter_id is not None:
                self._adapters[adapter_id].memory.wait()

    def _forget_arrival(self, adapter_id: str) -> None:
        for place in [place for place, arriving_id in self._arriving.items() if arriving_id == adapter_id]:
            del self._arriving[place]

    def _job(self, model_id: str) -> LoadJob | AdapterJob:
        return self._adapter_jobs.get(model_id) or self._jobs[model_id]

    def _bank(self, model_id: str) -> AdapterBank:
        bank = self._models[model_id].adapters
        assert bank is not None, "only a model that takes adapters has any"
        return bank


class KvOperations:
    """Turns the block pool's borrowing and returning of slabs into operations. Implements kvcache.blocks.KvMapper."""

    def __init__(self, model_id: str, enqueue: Callable[[Operation], None]) -> None:
        self._model_id = model_id
        self._enqueue = enqueue

    def map_kv(self, index: int, slab: int) -> None:
        self._enqueue(MapKv(self._model_id, index, slab))

    def unmap_kv(self, index: int) -> None:
        self._enqueue(UnmapKv(self._model_id, index))


class HostKvOperations:
    """Turns changes of a model's saved KV into operations. Implements kvcache.blocks.KvMapper and kvcache.host_blocks.KvCopies."""

    def __init__(self, model_id: str, enqueue: Callable[[Operation], None]) -> None:
        self._model_id = model_id
        self._enqueue = enqueue

    def map_kv(self, index: int, slab: int) -> None:
        del slab  # each rank takes a chunk of its own host memory
        self._enqueue(MapHostKv(self._model_id, index))

    def unmap_kv(self, index: int) -> None:
        self._enqueue(UnmapHostKv(self._model_id, index))

    def save(self, blocks: Sequence[tuple[int, int]]) -> None:
        self._enqueue(SaveKv(self._model_id, tuple(blocks)))

    def restore(self, blocks: Sequence[tuple[int, int]]) -> None:
        self._enqueue(RestoreKv(self._model_id, tuple(blocks)))
