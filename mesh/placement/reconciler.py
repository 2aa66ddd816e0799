"""Keeps this pod's copies equal to the registry, through restarts of the runtime and outages of the store."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState
from mesh.errors import NotFound, StoreError
from mesh.placement.copies import LocalCopies
from mesh.placement.loads import LocalLoads
from mesh.placement.model_states import ModelStates
from mesh.placement.placement import Placement
from mesh.placement.record_updates import RecordUpdates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import ModelRecord
from mesh.registry.registry import Registry
from mesh.types import RuntimeSnapshot

logger = logging.getLogger(__name__)

_SWEEP_S = 10.0
_FAILURE_KEPT_MS = 900_000  # ModelMesh's 15 minutes


class Reconciler:
    """`first_ready` and `runtime_changed` are the monitor's callbacks."""

    def __init__(
        self,
        registry: Registry,
        record_updates: RecordUpdates,
        copies: LocalCopies,
        loads: LocalLoads,
        placement: Placement,
        states: ModelStates,
        monitor: RuntimeMonitor,
        changes: Changes,
    ) -> None:
        self._registry = registry
        self._record_updates = record_updates
        self._copies = copies
        self._loads = loads
        self._placement = placement
        self._states = states
        self._monitor = monitor
        self._changes = changes
        self._own_id = registry.instances.own_id
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._registry.models.table.listen(self._record_changed)
        self._registry.instances.listen(lambda *_: self._changes.notify())
        self._spawn(self._monitor.run())
        self._spawn(self._sweep_periodically())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        await self._loads.close()

    async def withdraw(self) -> None:
        """Remove this pod's copies from the registry, before it shuts down."""
        copies = list(self._copies)
        for copy in copies:
            copy.is_announced = False
        try:
            for copy in copies:
                await self._record_updates.gone(
                    copy.model_id, last_used_ms=copy.last_used_ms, use=self._copies.uses.of(copy.model_id)
                )
        except StoreError as error:
            # One timeout per model would exceed the grace period. Other pods see that this pod is gone.
            logger.warning("this pod's copies stay in the registry: %s", error.message)

    def first_ready(self) -> None:
        """Load the models that the registry lists for this pod from before its restart, and forget its failures. The runtime is empty."""
        placed = self._registry.models.placed()
        for model_id, record in placed:
            # Their cause may have been mended, as by a larger disk.
            if self._own_id in record.failed_in and not self._states.is_quarantined(model_id):
                self._spawn(self._forget_failure(model_id))
        mine = [(model_id, record) for model_id, record in placed if self._own_id in record.instance_ids]
        for model_id, record in sorted(mine, key=lambda item: item[1].last_used_ms, reverse=True):
            self._placement.load_locally(model_id, last_used_ms=record.last_used_ms, urgent=False)

    def runtime_changed(self, snapshot: RuntimeSnapshot) -> None:
        """Record the failure of models that the runtime reports as failed or quarantined, with its reason, and what it reports of loads."""
        for model in snapshot.models:
            copy = self._copies.get(model.model_id)
            if copy is not None and copy.is_loaded and model.state in (CopyState.FAILED, CopyState.QUARANTINED):
                copy.is_announced = False
                self._copies.remove(copy)
                self._spawn(self._give_up(model.model_id, model.error or f"{model.state} by the runtime"))
            elif copy is not None and copy.is_loaded and model.weight_bytes and not copy.is_measured:
                copy.is_measured = True
                self._spawn(self._note_weight(model.model_id, model.weight_bytes))
            elif copy is not None and copy.is_pending and model.state is CopyState.LOADING and not copy.prepared_s:
                copy.prepared_s = time.monotonic()

    async def _forget_failure(self, model_id: str) -> None:
        with contextlib.suppress(StoreError):
            await self._record_updates.clear_own_failure(model_id)

    async def _note_weight(self, model_id: str, weight_bytes: int) -> None:
        with contextlib.suppress(StoreError):
            await self._record_updates.measured(model_id, weight_bytes)

    async def _give_up(self, model_id: str, error: str) -> None:
        with contextlib.suppress(StoreError):
            await self._record_updates.failed(model_id, error, at_ms=epoch_ms())

    def _record_changed(self, model_id: str, old: ModelRecord | None, new: ModelRecord | None) -> None:
        if new is not None and old is not None and self._own_id in new.failed_in.keys() - old.failed_in.keys():
            self._spawn(self._placement.try_elsewhere(model_id, new))
        copy = self._copies.get(model_id)
        if copy is not None and copy.state is not CopyState.UNLOADING:
            withdrawn = copy.is_announced and new is not None and self._own_id not in new.instance_ids
            if new is None or withdrawn or new.info != copy.info:
                copy.is_announced = False
                self._spawn(self._loads.unload(model_id))
        if new is not None and old is not None and old.instance_ids.keys() - new.instance_ids.keys() - {self._own_id}:
            self._copies.uses.seed(model_id, new.use)
        if new is None:
            self._loads.forget(model_id)
            self._copies.uses.forget(model_id)
        self._changes.notify()

    async def _sweep_periodically(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self.sweep()
            except StoreError as error:
                logger.warning("the registry is unreachable: %s", error.message)

    async def sweep(self) -> None:
        """Correct the records and the copies after an outage of the store, a crash, or a size prediction that was too low."""
        self._loads.trim()
        for copy in self._copies:
            if copy.is_loaded and not copy.is_announced:
                try:
                    await self._record_updates.loading(
                        copy.model_id, copy.info, started_ms=copy.started_ms, last_used_ms=copy.last_used_ms
                    )
                    copy.is_announced = True
                except NotFound:
                    await self._loads.unload(copy.model_id)
        if self._monitor.limits is None:
            return
        now_ms = epoch_ms()
        for model_id, record in self._registry.models.placed():
            if (
                self._own_id in record.instance_ids
                and self._copies.get(model_id) is None
                and self._loads.task(model_id) is None
            ):
                await self._record_updates.gone(model_id)
            if now_ms - record.failed_in.get(
                self._own_id, now_ms
            ) > _FAILURE_KEPT_MS and not self._states.is_quarantined(model_id):
                await self._record_updates.clear_own_failure(model_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("placement: %r", error, exc_info=error)
