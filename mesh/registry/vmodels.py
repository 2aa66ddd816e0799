"""Provides the vmodels: ModelMesh's `vmodels` table, and the transactions over vmodels and models.

vmodel_plan.py decides what is written; this module reads, writes and retries.
"""

import math
from collections.abc import Callable, Iterable

from mesh.errors import StoreUncertain
from mesh.registry.models import Models, check_registrable
from mesh.registry.records import ModelRecord, VModelRecord
from mesh.registry.table import Table, Versioned
from mesh.registry.vmodel_plan import (
    VModelPlan,
    VModelRequest,
    VModelView,
    plan_delete,
    plan_finish,
    plan_park,
    plan_set,
)
from mesh.store.protocol import Compare, Store, Write


class VModels:
    def __init__(self, store: Store, prefix: str, models: Models, *, default_owner: str) -> None:
        self.table = Table(store, prefix, VModelRecord, keep_lost_s=math.inf)
        self._store = store
        self._models = models
        self._default_owner = default_owner

    def get(self, vmodel_id: str) -> VModelRecord | None:
        return self.table.get(vmodel_id)

    async def find(self, vmodel_id: str) -> VModelRecord | None:
        return await self.table.find(vmodel_id)

    async def set(self, request: VModelRequest, *, now_ms: int, is_loaded: Callable[[str], bool]) -> VModelRecord:
        """Create or move a vmodel. Raises like plan_set, and StoreError."""
        if request.info is not None and request.target_id:
            check_registrable(request.target_id, request.info)

        def plan(view: VModelView) -> VModelPlan:
            return plan_set(
                request,
                view,
                target_is_loaded=is_loaded(request.target_id),
                now_ms=now_ms,
                default_owner=self._default_owner,
            )

        record = await self._transact(request.vmodel_id, plan, involved=(request.target_id,))
        assert record is not None
        return record

    async def finish(self, vmodel_id: str, *, target_id: str) -> VModelRecord | None:
        """Make the target the active model."""
        return await self._transact(vmodel_id, lambda view: plan_finish(view, target_id=target_id))

    async def park(self, vmodel_id: str, *, target_id: str) -> VModelRecord | None:
        """Mark the move to this target as failed."""
        return await self._transact(vmodel_id, lambda view: plan_park(view, target_id=target_id))

    async def delete(self, vmodel_id: str, *, owner: str = "") -> None:
        """Delete a vmodel; idempotent."""
        await self._transact(vmodel_id, lambda view: plan_delete(view, owner=owner))

    async def _transact(
        self, vmodel_id: str, plan: Callable[[VModelView], VModelPlan], involved: Iterable[str] = ()
    ) -> VModelRecord | None:
        """Read the involved records, plan, and write in one transaction that fails if a record has changed. Repeat until it succeeds."""
        self.table.check_changeable()
        self._models.table.check_changeable()
        vmodel = await self.table.read(vmodel_id)
        models: dict[str, Versioned[ModelRecord]] = {}
        answer_lost = False
        while True:
            for model_id in {*involved, *_model_ids(vmodel.record)} - {"", *models}:
                models[model_id] = await self._models.table.read(model_id)
            planned = plan(VModelView(vmodel.record, {model_id: known.record for model_id, known in models.items()}))
            writes, compares = self._stage(vmodel_id, vmodel, models, planned)
            if not writes:
                return planned.vmodel
            try:
                result = await self._store.txn(compares, writes)
            except StoreUncertain:
                # Plan again from the current records. A plan that was carried out is empty the second time.
                if answer_lost:
                    raise
                answer_lost = True
                vmodel = await self.table.read_after_lost_answer(vmodel_id)
                models.clear()
                continue
            if result.succeeded:
                if planned.vmodel != vmodel.record:
                    self.table.absorb_write(vmodel_id, vmodel, planned.vmodel, result.revision)
                for model_id, model in planned.models.items():
                    self._models.table.absorb_write(model_id, models[model_id], model, result.revision)
                return planned.vmodel
            current = iter(result.current)
            vmodel = self.table.absorb_conflict(vmodel_id, next(current), result.revision)
            models = {
                model_id: self._models.table.absorb_conflict(model_id, next(current), result.revision)
                for model_id in models
            }

    def _stage(
        self,
        vmodel_id: str,
        vmodel: Versioned[VModelRecord],
        models: dict[str, Versioned[ModelRecord]],
        planned: VModelPlan,
    ) -> tuple[list[Write], list[Compare]]:
        writes: list[Write] = []
        if planned.vmodel != vmodel.record:
            writes.append(self.table.stage(vmodel_id, vmodel, planned.vmodel)[0])
        writes += [
            self._models.table.stage(model_id, models[model_id], model)[0] for model_id, model in planned.models.items()
        ]
        compares = [self.table.expect(vmodel_id, vmodel)]
        compares += [self._models.table.expect(model_id, known) for model_id, known in models.items()]
        return writes, compares


def _model_ids(vmodel: VModelRecord | None) -> set[str]:
    return {vmodel.active_id, vmodel.target_id} if vmodel else set()
