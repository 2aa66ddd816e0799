"""Loads and unloads: at most one load per model at a time, and one answer, in order, for every Load and Unload.

A load is answered when its model can serve a first request at once: the weights that have begun to come to the device are there, and idle turns have
captured the graphs of such a request.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.model_table import ModelTable
from runtime.engine.operations import StartLoad
from runtime.errors import ModelTooLarge, RepertoryError
from runtime.ipc.messages import Load, Loaded, LoadFailed, Unload, Unloaded
from runtime.types import FinishReason, ModelFacts

_LONGEST_PREPARATION_S = 2.0

L = TypeVar("L")  # what a load brings
R = TypeVar("R")  # what it is registered as


@dataclass(slots=True)
class _Pending:
    """A job in progress. `answers`: Loads that its end answers. `later`: commands that cancelled it, or came after that; its end applies them."""

    request: Load
    answers: int = 1
    cancelled: bool = False
    later: list[Load | Unload] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Preparing:
    """A loaded model whose load is not answered. `due_s`: when it is, prepared or not."""

    pending: _Pending
    model: LoadedModel
    due_s: float


@dataclass(slots=True)
class Loads:
    """`collect_all_of` collects the steps of a model that are in flight, which must come before its unload."""

    table: ModelTable
    collect_all_of: Callable[[str], None]
    _pending: dict[str, _Pending] = field(default_factory=dict)
    _preparing: dict[str, _Preparing] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._pending) + len(self._preparing)

    def load(self, request: Load, now: float) -> None:
        model_id = request.model_id
        self._end_preparation(model_id)
        pending = self._pending.get(model_id)
        if pending is not None:
            if not pending.cancelled and pending.request == request:
                pending.answers += 1
                return
            self._cancel(pending, "another load of it came")
            pending.later.append(request)
            return
        loaded = self.table.adapters.adapters.get(model_id) or self.table.models.get(model_id)
        if loaded is not None:
            if _content(loaded.request) == _content(request):
                self.table.emit(Loaded(loaded.facts))
                return
            self._unregister(model_id, now)
        self._start(request)

    def unload(self, model_id: str, now: float) -> None:
        self._end_preparation(model_id)
        pending = self._pending.get(model_id)
        if pending is not None:
            self._cancel(pending, "it was unloaded while it loaded")
            pending.later.append(Unload(model_id))
            return
        self._unregister(model_id, now)
        self.table.emit(Unloaded(model_id))

    def poll(self, now: float) -> bool:
        """Register the models whose loads have finished, and answer. Returns whether a load ended."""
        before = len(self)
        for model_id, pending in [(m, p) for m, p in self._pending.items() if self.table.executor.load_is_done(m)]:
            del self._pending[model_id]
            self._finish(pending, now)
            for command in pending.later:
                if isinstance(command, Load):
                    self.load(command, now)
                else:
                    self.unload(model_id, now)
        for model_id in [model_id for model_id, one in self._preparing.items() if self._is_prepared(one, now)]:
            self._end_preparation(model_id)
        return len(self) != before

    def stop(self) -> None:
        """Cancel all loads and wait for them, because the engine ends."""
        executor = self.table.executor
        for model_id in self._pending:
            executor.cancel_load(model_id)
        for model_id, pending in self._pending.items():
            try:
                if pending.request.adapter_of:
                    executor.finish_adapter_load(model_id)
                else:
                    executor.finish_load(model_id)
            except Exception:
                continue  # the load was cancelled or failed, and holds nothing
            executor.unload(model_id)
        self._pending.clear()
        self._preparing.clear()

    def _start(self, request: Load) -> None:
        size_bytes = request.checkpoint.weight_bytes
        try:
            self.table.check_fits(request, size_bytes)
            self.table.make_host_room(size_bytes // self.table.config.tensor_parallel)
            if request.adapter_of:
                self.table.check_base(request)
            self.table.executor.start_load(
                StartLoad(request.model_id, request.checkpoint, request.max_model_len, request.adapter_of)
            )
        except Exception as error:
            self._fail(1, _reason(request.model_id, error))
            return
        self._pending[request.model_id] = _Pending(request)

    def _finish(self, pending: _Pending, now: float) -> None:
        if pending.request.adapter_of:
            self._finish_adapter(pending, now)
        else:
            self._finish_model(pending, now)

    def _finish_model(self, pending: _Pending, now: float) -> None:
        request, executor = pending.request, self.table.executor
        model = self._registered(
            pending, executor.finish_load, lambda loaded: self.table.register(request, loaded, now)
        )
        if model is None:
            return
        self.table.exchange.load_if_free(model, now)
        executor.flush()
        failure = executor.take_failed_swap_in(request.model_id)
        if failure is not None:
            self.table.unregister(model, FinishReason.ERROR, now)
            self._fail(pending.answers, _reason(request.model_id, failure))
            return
        self._preparing[request.model_id] = _Preparing(pending, model, now + _LONGEST_PREPARATION_S)

    def _is_prepared(self, preparing: _Preparing, now: float) -> bool:
        model = preparing.model
        # A model for which there is no memory now is prepared when it comes to the device.
        if now >= preparing.due_s or not model.resident:
            return True
        # While another model has work, no idle turn comes.
        models = self.table.models.values()
        return not model.swapping and (
            self.table.executor.is_prepared(model.model_id) or any(other.has_work() for other in models)
        )

    def _end_preparation(self, model_id: str) -> None:
        """Answer the loads of a model that is being prepared, unless the model was found broken, which was reported."""
        preparing = self._preparing.pop(model_id, None)
        if preparing is not None and self.table.models.get(model_id) is preparing.model:
            self._answer(preparing.pending, preparing.model.facts)

    def _finish_adapter(self, pending: _Pending, now: float) -> None:
        request, executor = pending.request, self.table.executor
        adapter = self._registered(
            pending, executor.finish_adapter_load, lambda loaded: self.table.register_adapter(request, loaded, now)
        )
        if adapter is None:
            return
        self.table.adapters.load_if_free(adapter, now)
        executor.flush()
        self._answer(pending, adapter.facts)

    def _registered(self, pending: _Pending, finish: Callable[[str], L], register: Callable[[L], R]) -> R | None:
        """Take what was loaded from the executor and register it. Returns None if the load failed, which is answered, or was cancelled."""
        model_id = pending.request.model_id
        try:
            loaded = finish(model_id)
        except Exception as error:
            self._fail(pending.answers, _reason(model_id, error))
            return None
        if pending.cancelled:
            self.table.executor.unload(model_id)
            return None
        try:
            return register(loaded)
        except Exception as error:
            self.table.executor.unload(model_id)
            self._fail(pending.answers, _reason(model_id, error))
            return None

    def _answer(self, pending: _Pending, facts: ModelFacts) -> None:
        # The figures come before the answer, so that its reader finds the model in its tier.
        self.table.emit(self.table.stats())
        for _ in range(pending.answers):
            self.table.emit(Loaded(facts))

    def _unregister(self, model_id: str, now: float) -> None:
        adapter = self.table.adapters.adapters.get(model_id)
        if adapter is not None:
            self.collect_all_of(adapter.base.model_id)
            if model_id in self.table.adapters.adapters:
                self.table.unregister_adapter(adapter, FinishReason.ABORTED, now)
            return
        if model_id in self.table.models:
            self.collect_all_of(model_id)
        # settling may have found the model broken, and forgotten it
        model = self.table.models.get(model_id)
        if model is not None:
            self.table.unregister(model, FinishReason.ABORTED, now)

    def _cancel(self, pending: _Pending, text: str) -> None:
        if not pending.cancelled:
            pending.cancelled = True
            self.table.executor.cancel_load(pending.request.model_id)
        self._fail(pending.answers, LoadFailed(pending.request.model_id, "CANCELLED", text))
        pending.answers = 0

    def _fail(self, answers: int, failure: LoadFailed) -> None:
        for _ in range(answers):
            self.table.emit(failure)


def _content(request: Load) -> tuple[object, ...]:
    """Return what must be equal for a load to be the same."""
    return request.checkpoint, request.max_model_len, request.adapter_of


def _reason(model_id: str, error: Exception) -> LoadFailed:
    if not isinstance(error, RepertoryError):
        return LoadFailed(model_id, "FAILED_PRECONDITION", f"{type(error).__name__}: {error}")
    budget_bytes = int(error.limit or 0) if isinstance(error, ModelTooLarge) else 0
    return LoadFailed(model_id, error.code, error.detail, budget_bytes)
