"""Bounds how long requests wait for memory that the requests of other models hold."""

from runtime.engine.core.end_times import first_end_s
from runtime.engine.core.loaded_model import LoadedModel
from runtime.engine.core.model_table import ModelTable
from runtime.types import FinishReason

_CHECK_EVERY_S = 1.0  # also the shortest limit: every resident model has had its turn by then


class WaitLimit:
    """Ends the requests of a model that has run nothing for `limit_s` while requests waited, with a retry hint."""

    def __init__(self, table: ModelTable, limit_s: float) -> None:
        self._table = table
        self._limit_s = limit_s
        self._due_s = 0.0
        self._blocked_since_s: dict[str, float] = {}

    def apply(self, now: float) -> None:
        """Check the limit, once a second. Call it after a launch, when each model has had its chance."""
        if now < self._due_s:
            return
        self._due_s = now + _CHECK_EVERY_S
        models = [*self._table.models.values()]
        blocked = [m for m in models if len(m.scheduler.waiting) and not m.scheduler.running]
        self._blocked_since_s = {m.model_id: self._blocked_since_s.get(m.model_id, now) for m in blocked}
        for model in blocked:
            if now - self._blocked_since_s[model.model_id] >= self._limit_s:
                self._refuse(model, models, now)

    def _refuse(self, model: LoadedModel, models: list[LoadedModel], now: float) -> None:
        late = [s for s in model.scheduler.waiting.members() if now - s.arrived_s >= self._limit_s]
        holders = ", ".join(m.model_id for m in models if m.scheduler.running)
        text = f"it waited {self._limit_s:g} s, the limit, while running requests of {holders or 'other models'} held the device memory"
        hint_s = first_end_s(models)
        self._table.end(model, late, FinishReason.ERROR, now, "RESOURCE_EXHAUSTED", text, retry_after_s=hint_s)
