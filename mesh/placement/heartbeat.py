"""Publishes this pod's record: its capacity, its copies and its load.

Changes of state are published at once, and then only what changed is written. The load, which changes with every request, is published with the
whole record every few seconds, and only in a mesh of several pods.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from common.changes import Changes
from common.model_state import ModelState
from mesh.errors import StoreError
from mesh.placement.copies import LocalCopies
from mesh.placement.copy_reports import CopyReports
from mesh.placement.usage import NEVER_MS
from mesh.registry.instances import Instances
from mesh.registry.records import CAPACITY_UNIT_BYTES, LRU_EMPTY_MS, InstanceRecord
from mesh.types import RuntimeSnapshot

logger = logging.getLogger(__name__)

_LOAD_INTERVAL_S = 2.0
_PODS_PER_INTERVAL = 25  # every pod receives each record, so that the interval grows with their number
_MIN_INTERVAL_S = 0.1
_DIGITS = 3  # of fractions: every pod receives each record


class Heartbeat:
    """`identity`: a record with the constant fields (start time, addresses, labels). The callables return current values."""

    def __init__(
        self,
        instances: Instances,
        identity: InstanceRecord,
        copies: LocalCopies,
        changes: Changes,
        *,
        snapshot: Callable[[], RuntimeSnapshot],
        num_loading: Callable[[], int],
        loading_threads: Callable[[], int],
        can_serve: Callable[[], bool],
        load_failures: Callable[[], int],
    ) -> None:
        self._instances = instances
        self._identity = identity
        self._copies = copies
        self._changes = changes
        self._snapshot = snapshot
        self._num_loading = num_loading
        self._loading_threads = loading_threads
        self._can_serve = can_serve
        self._load_failures = load_failures
        self._shutting_down = False
        self._reports = CopyReports()
        self._published: InstanceRecord | None = None  # without the load
        self._written: InstanceRecord | None = (
            None  # the last one that was written whole, with the figures that can wait
        )

    async def run(self) -> None:
        loads_at_s = 0.0
        while True:
            seen = self._changes.version
            record, settled = self._record()
            now_s = time.monotonic()
            num_pods = len(self._instances.table)
            due = now_s - loads_at_s >= load_interval_s(num_pods) and num_pods > 1
            if settled != self._published or (due and record != self._written):
                if due:
                    loads_at_s = now_s
                await self._publish(record, settled, whole=due)
            await asyncio.sleep(_MIN_INTERVAL_S)
            await self._changes.wait(_LOAD_INTERVAL_S, since=seen)

    async def flush(self) -> None:
        """Publish now if the record differs from the published one, so that the answer of a synchronous call is true at every pod."""
        record, settled = self._record()
        if settled != self._published:
            await self._publish(record, settled, whole=False)

    def leave(self) -> None:
        """Mark this pod as shutting down in its record: other pods stop placing models and sending requests here."""
        self._shutting_down = True

    def _record(self) -> tuple[InstanceRecord, InstanceRecord]:
        """Return this pod's record, and the same without the load."""
        snapshot = self._snapshot()
        models = {model.model_id: model for model in snapshot.models}
        usage = self._copies.usage()
        self._reports.update(self._copies, models)
        reports = self._reports.reports()
        record = msgspec.structs.replace(
            self._identity,
            lru_time_ms=LRU_EMPTY_MS if usage.lru_ms == NEVER_MS else usage.lru_ms,
            count=len(reports),
            capacity_units=usage.capacity_bytes // CAPACITY_UNIT_BYTES,
            used_units=(usage.used_bytes - usage.unloading_bytes) // CAPACITY_UNIT_BYTES,
            loading_threads=self._loading_threads(),
            loads_in_progress=self._num_loading(),
            requests_per_min=self._copies.requests_per_min(),
            shutting_down=self._shutting_down,
            cannot_serve=not self._can_serve(),
            load_failures=self._load_failures(),
            victim_use=round(usage.victim_use, 2),
            device_budget_bytes=snapshot.device_budget_bytes,
            device_used_bytes=snapshot.device_used_bytes,
            host_budget_bytes=snapshot.host_budget_bytes,
            host_used_bytes=snapshot.host_used_bytes,
            kv_usage=round(max((model.kv_usage for model in snapshot.models), default=0.0), _DIGITS),
            running=sum(model.running for model in snapshot.models),
            waiting=sum(model.waiting for model in snapshot.models),
            tokens_per_s=round(sum(model.tokens_per_s for model in snapshot.models), _DIGITS),
            copies=reports,
            devices=snapshot.devices,
            used_ms={copy.model_id: copy.last_used_ms for copy in self._copies if copy.last_used_ms},
        )
        return record, _without_load(record, self._reports.settled())

    async def _publish(self, record: InstanceRecord, settled: InstanceRecord, *, whole: bool) -> None:
        try:
            if await self._instances.publish(record, whole=whole):
                self._written = record
            self._published = settled
        except StoreError as error:
            logger.warning("this pod's record could not be published: %s", error.message)


def load_interval_s(num_pods: int) -> float:
    """Return the seconds between two publications of the figures that change with every request. `num_pods`: the size of the mesh."""
    return _LOAD_INTERVAL_S * max(1.0, num_pods / _PODS_PER_INTERVAL)


def _without_load(record: InstanceRecord, copies: Mapping[str, ModelState]) -> InstanceRecord:
    """Return the record with these copies and without the figures that change with every request."""
    devices = tuple(msgspec.structs.replace(device, used_bytes=0) for device in record.devices)
    return msgspec.structs.replace(
        record,
        lru_time_ms=0,
        used_units=0,
        requests_per_min=0,
        victim_use=0.0,
        device_used_bytes=0,
        host_used_bytes=0,
        kv_usage=0.0,
        running=0,
        waiting=0,
        tokens_per_s=0.0,
        copies=copies,
        devices=devices,
        used_ms={},
    )
