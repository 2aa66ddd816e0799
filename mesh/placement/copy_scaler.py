"""Adds copies of models whose requests queue, drops idle ones, and hands models over when the pod leaves."""

import asyncio
import logging
import time
from collections.abc import Callable

from common.clock import epoch_ms
from mesh.errors import MeshError
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.copy_scaling import Change, CopyLoad, plan_copies
from mesh.placement.loads import LocalLoads
from mesh.placement.model_states import ModelStates
from mesh.placement.placement import Placement
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import ModelRecord
from mesh.registry.registry import Registry

logger = logging.getLogger(__name__)

_EVERY_S = 1.0
_SPARED_MS = 60_000  # an additional copy displaces no model that was used more recently
_MAX_HANDED_OVER = 50
_HAND_OVER_S = 3.0


class CopyScaler:
    """Each pod decides about its own copies; of the pods that have a model, the first one by id adds copies."""

    def __init__(
        self,
        registry: Registry,
        placement: Placement,
        copies: LocalCopies,
        loads: LocalLoads,
        states: ModelStates,
        monitor: RuntimeMonitor,
        *,
        is_leader: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._copies = copies
        self._loads = loads
        self._states = states
        self._monitor = monitor
        self._is_leader = is_leader
        self._own_id = registry.instances.own_id
        self._queued_since_s: dict[str, float] = {}
        self._busy_at_s: dict[str, float] = {}
        self._with_minimum: set[str] = set()
        for model_id, record in registry.models.table.items():
            self._record_changed(model_id, None, record)
        registry.models.table.listen(self._record_changed)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.sweep(time.monotonic())
            except MeshError as error:
                logger.warning("copies are not adjusted now: %s", error.message)

    async def sweep(self, now_s: float) -> None:
        """Adjust the number of copies. Raises MeshError."""
        loaded = [copy for copy in self._copies if copy.is_loaded]
        self._observe(loaded, now_s)
        if self._monitor.is_serving:
            for copy in loaded:
                await self._adjust(copy, now_s)
        if self._is_leader():
            for model_id in tuple(self._with_minimum):
                record = self._registry.models.get(model_id)
                if record is not None and not record.instance_ids:
                    await self._placement.ensure_loaded(model_id, last_used_ms=epoch_ms() - _SPARED_MS)

    async def hand_over(self) -> None:
        """Have other pods load the models of this pod that no other pod has, the most used ones first, before this pod leaves."""
        held = sorted(
            (copy for copy in self._copies if copy.is_loaded and not self._holders(copy.model_id) - {self._own_id}),
            key=lambda copy: self._copies.uses.of(copy.model_id),
            reverse=True,
        )
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                for copy in held[:_MAX_HANDED_OVER]:
                    if not self._placement.has_other_pod(copy.model_id, {self._own_id}):
                        return
                    await self._placement.ensure_loaded(
                        copy.model_id, last_used_ms=copy.last_used_ms, avoid=frozenset({self._own_id})
                    )
        except (MeshError, TimeoutError) as error:
            logger.warning("not all models could be handed over: %s", error or f"it took {_HAND_OVER_S:g} s")

    def _observe(self, loaded: list[LocalCopy], now_s: float) -> None:
        ids = {copy.model_id for copy in loaded}
        self._queued_since_s = {key: since_s for key, since_s in self._queued_since_s.items() if key in ids}
        self._busy_at_s = {key: at_s for key, at_s in self._busy_at_s.items() if key in ids}
        for copy in loaded:
            model = self._monitor.model(copy.model_id)
            running = self._copies.in_flight(copy.model_id)
            is_queued = bool((model is not None and model.waiting) or self._copies.num_waiting(copy.model_id))
            if is_queued:
                self._queued_since_s.setdefault(copy.model_id, now_s)
            else:
                self._queued_since_s.pop(copy.model_id, None)
            used_s = now_s - max(0, epoch_ms() - copy.last_used_ms) / 1000
            self._busy_at_s[copy.model_id] = (
                now_s if running or is_queued else max(self._busy_at_s.get(copy.model_id, 0.0), used_s)
            )

    async def _adjust(self, copy: LocalCopy, now_s: float) -> None:
        model_id = copy.model_id
        holders = self._holders(model_id) | {self._own_id}
        load = CopyLoad(
            num_copies=len(holders),
            num_pods=len(self._placement.pods_for(copy.info.type) | holders),
            is_first=min(holders) == self._own_id,
            queued_s=now_s - self._queued_since_s.get(model_id, now_s),
            idle_s=now_s - self._busy_at_s.get(model_id, now_s),
        )
        change = plan_copies(load, self._copies.settings_of(model_id))
        if change is Change.ADD:
            logger.info("adding a copy", extra={"model": model_id, "copies": len(holders), "queued_s": load.queued_s})
            # The queue has to last as long again before the next copy.
            self._queued_since_s.pop(model_id, None)
            await self._placement.ensure_loaded(
                model_id, last_used_ms=epoch_ms() - _SPARED_MS, avoid=frozenset(holders)
            )
        elif change is Change.DROP:
            logger.info("dropping a copy", extra={"model": model_id, "copies": len(holders), "idle_s": load.idle_s})
            await self._loads.unload(model_id)

    def _holders(self, model_id: str) -> set[str]:
        """Return the live pods that have the model or load it."""
        record = self._registry.models.get(model_id)
        return record.instance_ids.keys() & {self._own_id, *self._states.pods()} if record is not None else set()

    def _record_changed(self, model_id: str, _: ModelRecord | None, new: ModelRecord | None) -> None:
        if new is not None and new.copy_settings.min_copies:
            self._with_minimum.add(model_id)
        else:
            self._with_minimum.discard(model_id)
