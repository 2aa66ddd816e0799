"""Removes the ids of pods that have been gone for long from the models' records.

The leader does this for the mesh. A pod that restarts before finds its models in the records and loads them again. Routing ignores the ids
of absent pods; the removal keeps the records correct for other readers.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Set

import msgspec

from mesh.errors import StoreError
from mesh.registry.records import ModelRecord
from mesh.registry.registry import Registry

logger = logging.getLogger(__name__)

AWAY_S = 600.0  # ModelMesh's
_EVERY_S = 60.0


class Reaper:
    def __init__(
        self, registry: Registry, *, is_leader: Callable[[], bool], away_s: float = AWAY_S, every_s: float = _EVERY_S
    ) -> None:
        self._registry = registry
        self._is_leader = is_leader
        self._away_s = away_s
        self._every_s = every_s
        self._away_since_s: dict[str, float] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.sweep(time.monotonic())
            except StoreError as error:
                logger.warning("the records of absent pods are kept until the next sweep: %s", error.message)

    async def sweep(self, now_s: float) -> None:
        """Raises StoreError."""
        records = dict(self._registry.models.placed())
        there = {pod_id for pod_id, _ in self._registry.instances.items()}
        if self._registry.instances.own_id not in there:
            # If this pod's own record is missing, the absence of others proves nothing.
            self._away_since_s.clear()
            return
        away = named_in(records) - there
        # Every pod keeps the times, so that a new leader has them.
        self._away_since_s = {pod_id: self._away_since_s.get(pod_id, now_s) for pod_id in away}
        gone = {pod_id for pod_id, since_s in self._away_since_s.items() if now_s - since_s >= self._away_s}
        if not gone or not self._is_leader():
            return
        for model_id, record in records.items():
            if named_in({model_id: record}) & gone:
                await self._registry.models.table.update(
                    model_id, lambda old: without(old, gone) if old is not None else None
                )
        for pod_id in gone:
            del self._away_since_s[pod_id]
        logger.info("removed absent pods from the records: %s", ", ".join(sorted(gone)))


def named_in(records: Mapping[str, ModelRecord]) -> set[str]:
    """Return all pods that the records name."""
    return {
        pod_id for record in records.values() for pod_id in (*record.instance_ids, *record.failed_in, *record.failures)
    }


def without(record: ModelRecord, pods: Set[str]) -> ModelRecord:
    return msgspec.structs.replace(
        record,
        instance_ids={pod_id: since_ms for pod_id, since_ms in record.instance_ids.items() if pod_id not in pods},
        failed_in={pod_id: at_ms for pod_id, at_ms in record.failed_in.items() if pod_id not in pods},
        failures={pod_id: failure for pod_id, failure in record.failures.items() if pod_id not in pods},
    )
