"""Moves vmodels: loads the new target, then switches to it. A move whose target cannot be loaded is parked and tried again.

The leader does this for the mesh. Two leaders do no harm, because every step is a compare-and-set.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from mesh.errors import MeshError
from mesh.registry.records import ModelRecord, VModelRecord
from mesh.registry.registry import Registry
from mesh.types import Loader, ModelStatus, ModelStatuses

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
RETRY_EVERY_S = 60.0


class Transitions:
    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        states: ModelStatuses,
        *,
        is_leader: Callable[[], bool] = lambda: True,
        load_timeout_s: float = LOAD_TIMEOUT_S,
        retry_every_s: float = RETRY_EVERY_S,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._states = states
        self._is_leader = is_leader
        self._load_timeout_s = load_timeout_s
        self._retry_every_s = retry_every_s
        self._moving: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._stops: list[Callable[[], None]] = []
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._stops = [
            self._registry.vmodels.table.listen(self._vmodel_changed),
            self._registry.models.table.listen(self._model_changed),
        ]
        self._sweeper = asyncio.create_task(self._sweep_for_ever(), name="vmodel-transitions")

    async def close(self) -> None:
        """Stop. Moves in progress are left to the next leader."""
        for stop in self._stops:
            stop()
        tasks = [*self._moving.values(), *([self._sweeper] if self._sweeper else [])]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task

    def sweep(self) -> None:
        """Try every move again, including the parked ones."""
        for vmodel_id, vmodel in self._registry.vmodels.table.items():
            self._begin(vmodel_id, vmodel)

    async def _sweep_for_ever(self) -> None:
        while True:
            self.sweep()
            await asyncio.sleep(self._retry_every_s)

    def _vmodel_changed(self, vmodel_id: str, _: VModelRecord | None, vmodel: VModelRecord | None) -> None:
        if vmodel is not None and not vmodel.failed:
            self._begin(vmodel_id, vmodel)

    def _model_changed(self, model_id: str, old: ModelRecord | None, new: ModelRecord | None) -> None:
        """Retry parked moves when a failure of their target has expired or their target was loaded."""
        if old is None or new is None:
            return
        has_expired = len(new.failed_in) < len(old.failed_in)
        placed = bool(new.instance_ids.keys() - old.instance_ids.keys())
        if has_expired or placed:
            for vmodel_id in self._registry.pointing_at(model_id):
                vmodel = self._registry.vmodels.get(vmodel_id)
                if vmodel is not None and vmodel.target_id == model_id and vmodel.failed:
                    self._begin(vmodel_id, vmodel)

    def _begin(self, vmodel_id: str, vmodel: VModelRecord) -> None:
        move = (vmodel_id, vmodel.target_id)
        if vmodel.is_moving and move not in self._moving and self._is_leader():
            task = asyncio.create_task(self._move(vmodel_id, vmodel), name=f"move {vmodel_id} to {vmodel.target_id}")
            self._moving[move] = task
            task.add_done_callback(lambda _: self._moving.pop(move))

    async def _move(self, vmodel_id: str, vmodel: VModelRecord) -> None:
        target_id = vmodel.target_id
        try:
            if await self._target_is_ready(vmodel):
                await self._registry.vmodels.finish(vmodel_id, target_id=target_id)
                logger.info("vmodel %s moved from %s to %s", vmodel_id, vmodel.active_id, target_id)
            else:
                parked = await self._registry.vmodels.park(vmodel_id, target_id=target_id)
                # A vmodel that was moved elsewhere in the meantime belongs to another move.
                if parked is not None and parked.target_id == target_id:
                    logger.warning(
                        "vmodel %s stays at %s: %s could not be loaded", vmodel_id, vmodel.active_id, target_id
                    )
        except MeshError as error:
            # Most likely the store is unreachable. The next sweep tries again.
            logger.warning("vmodel %s: the move to %s is postponed: %s", vmodel_id, target_id, error)

    async def _target_is_ready(self, vmodel: VModelRecord) -> bool:
        """Load the target if the active model is loaded. Return whether the vmodel may switch."""
        active = await self._registry.models.find(vmodel.active_id)
        if active is None or not active.instance_ids:
            return True
        try:
            async with asyncio.timeout(self._load_timeout_s):
                while True:
                    status = await self._loader.ensure_loaded(
                        vmodel.target_id, last_used_ms=active.last_used_ms, wait=True
                    )
                    if status.status is not ModelStatus.LOADING_FAILED or self._states.blocked_for_s(vmodel.target_id):
                        break  # otherwise another pod may still be able to load it
        except (MeshError, TimeoutError) as error:
            logger.info("model %s cannot be loaded: %s", vmodel.target_id, error or "it took too long")
            return False
        return status.status is ModelStatus.LOADED
