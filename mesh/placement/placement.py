"""Chooses the pod that loads a model, and has it loaded there."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Set
from typing import Protocol

from common.changes import Changes
from common.clock import epoch_ms
from mesh.errors import LoadFailed, MeshError, NotFound, Unavailable
from mesh.placement.copies import LocalCopies
from mesh.placement.loads import LocalLoads
from mesh.placement.model_states import ModelStates
from mesh.placement.model_status import may_load
from mesh.placement.pod_selection import Pod, choose_pod
from mesh.placement.record_updates import RecordUpdates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.placement.type_constraints import TypeConstraints
from mesh.registry.records import CAPACITY_UNIT_BYTES, InstanceRecord, ModelRecord
from mesh.registry.registry import Registry
from mesh.types import ModelStatus, RuntimeClient, StatusInfo

logger = logging.getLogger(__name__)

_ANNOUNCE_S = 1.0
_REMOTE_START_S = 5.0  # a pod that was asked to load has announced it by then
_UNLOAD_S = 60.0


class PeerLoads(Protocol):
    async def load(self, pod: InstanceRecord, model_id: str, *, last_used_ms: int) -> None:
        """Have another pod load a model, and return when the load has begun. Raises MeshError if the pod is unreachable or refuses."""

    async def unload_now(self, pod: InstanceRecord, model_id: str) -> None:
        """Have another pod end a model's requests and unload it. Raises MeshError if the pod is unreachable or refuses."""


class Placement:
    """Implements mesh.types.Loader: chooses the pod that loads a model, and has it loaded there."""

    def __init__(
        self,
        registry: Registry,
        runtime: RuntimeClient,
        record_updates: RecordUpdates,
        copies: LocalCopies,
        loads: LocalLoads,
        peers: PeerLoads,
        states: ModelStates,
        monitor: RuntimeMonitor,
        changes: Changes,
        *,
        failure_expiry_s: float,
        constraints: TypeConstraints,
        own_labels: tuple[str, ...],
    ) -> None:
        self._registry = registry
        self._runtime = runtime
        self._record_updates = record_updates
        self._copies = copies
        self._loads = loads
        self._peers = peers
        self._states = states
        self._monitor = monitor
        self._changes = changes
        self._failure_expiry_s = failure_expiry_s
        self._constraints = constraints
        self._own_labels = own_labels
        self._own_id = registry.instances.own_id

    async def ensure_loaded(
        self,
        model_id: str,
        *,
        last_used_ms: int = 0,
        wait: bool = False,
        retry_failed: bool = False,
        local_only: bool = False,
        avoid: frozenset[str] = frozenset(),
    ) -> StatusInfo:
        """Implement Loader. `retry_failed`: an explicit load request, which clears earlier failures. `local_only`: load on this pod even if another
        one has a copy. `avoid`: pods whose copies do not count, and that are asked to load only if no other pod can.

        Raises NotFound; with `wait` also Overloaded (all models are in use, so there is no room) and Unavailable (the runtime is gone).
        """
        record = await self._registry.models.find(model_id)
        if record is None:
            raise NotFound(f"model {model_id} not found")
        used_ms = last_used_ms or epoch_ms()
        self._copies.touch(model_id, used_ms)
        status = self._states.status(model_id, besides=avoid)
        now = self._states.local_status(model_id) if local_only else status.status
        if now is ModelStatus.LOADED or (now is ModelStatus.LOADING and not wait):
            return status
        if now is not ModelStatus.LOADING:
            if retry_failed:
                await self._clear_failures(model_id)
                record = self._registry.models.get(model_id) or record
            elif self._states.record_blocked_for_s(model_id, record) > 0:
                return status
            await self._begin(
                model_id,
                record,
                last_used_ms=used_ms,
                urgent=last_used_ms == 0 or retry_failed,
                local_only=local_only,
                avoid=avoid,
            )
        return await self._outcome(model_id, avoid) if wait else self._states.status(model_id)

    async def unload(self, model_id: str, *, now: bool = False) -> None:
        """Implement Loader. `now`: end running requests instead of waiting for them within the grace period."""
        record = self._registry.models.get(model_id)
        holders = set(record.instance_ids) - {self._own_id} if record is not None else set()
        await self._record_updates.clear_instances(model_id)
        if now:
            for pod_id, pod in self._registry.instances.live():
                if pod_id in holders:
                    with contextlib.suppress(MeshError):  # The pod unloads within its grace period: the record says so.
                        await self._peers.unload_now(pod, model_id)
        await self.unload_locally(model_id, now=now)
        if self._states.is_quarantined(model_id):
            await self._clear_failures(model_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNLOAD_S):
                while any(
                    model_id in pod.copies for pod_id, pod in self._registry.instances.live() if pod_id != self._own_id
                ):
                    await self._changes.wait()

    async def unload_locally(self, model_id: str, *, now: bool) -> None:
        """Unload this pod's copy."""
        await self._loads.unload(model_id, now=now)

    def has_other_pod(self, model_id: str, avoid: Set[str]) -> bool:
        """Return whether a pod that is not in `avoid` may load the model."""
        record = self._registry.models.get(model_id)
        if record is None:
            return False
        constraint, pods = self._constraints.of(record.info.type), self._states.pods()
        return any(
            constraint.allows(self._labels(pod_id, pods)) and (pod.http_address or pod_id == self._own_id)
            for pod_id, pod in pods.items()
            if pod_id not in avoid
        )

    def load_locally(self, model_id: str, *, last_used_ms: int, urgent: bool = True) -> None:
        record = self._registry.models.get(model_id)
        if record is not None:
            self._loads.load(model_id, record.info, last_used_ms=last_used_ms, urgent=urgent)

    async def _clear_failures(self, model_id: str) -> None:
        """Clear the recorded failures. An explicit unload ends the runtime's quarantine of the model."""
        if self._states.is_quarantined(model_id):
            with contextlib.suppress(Unavailable):
                await self._runtime.unload(model_id)
        await self._record_updates.clear_failures(model_id)

    async def _begin(
        self,
        model_id: str,
        record: ModelRecord,
        *,
        last_used_ms: int,
        urgent: bool,
        local_only: bool,
        avoid: frozenset[str],
    ) -> None:
        pods = self._states.pods()
        constraint = self._constraints.of(record.info.type)
        if not any(constraint.allows(self._labels(pod_id, pods)) for pod_id in {self._own_id, *pods}):
            raise LoadFailed(
                "There are no running instances that meet the label requirements of type "
                f"{record.info.type}: [{', '.join(constraint.required)}]"
            )
        is_allowed_locally = constraint.allows(self._labels(self._own_id, pods))
        if not local_only and pods.keys() - {self._own_id}:
            preferred = {pod_id: pod for pod_id, pod in pods.items() if pod_id not in avoid}
            target = await self._choose(model_id, record, preferred or pods)
            if target is not None and not target.local:
                try:
                    await self._peers.load(pods[target.instance_id], model_id, last_used_ms=last_used_ms)
                    await self._announced(model_id, avoid)
                    return
                except MeshError as error:
                    logger.warning(
                        "model %s: pod %s cannot load it, loading it here: %s",
                        model_id,
                        target.instance_id,
                        error.message,
                    )
        if not is_allowed_locally:
            raise Unavailable("no pod that meets its label requirements can load it now", model=model_id)
        self._loads.load(model_id, record.info, last_used_ms=last_used_ms, urgent=urgent)

    async def try_elsewhere(self, model_id: str, record: ModelRecord) -> None:
        """After a failure here, ask another pod to load the model; as in ModelMesh, up to three pods try."""
        pods = self._states.pods()
        if record.instance_ids.keys() & pods.keys() or self._states.record_blocked_for_s(model_id, record) > 0:
            return
        target = await self._choose(model_id, record, pods)
        if target is None or target.local:
            return
        try:
            await self._peers.load(pods[target.instance_id], model_id, last_used_ms=record.last_used_ms)
        except MeshError as error:
            logger.warning("model %s: pod %s cannot load it either: %s", model_id, target.instance_id, error.message)

    async def _announced(self, model_id: str, avoid: Set[str]) -> None:
        """Wait until the peer's load is in the record, so that the status is LOADING when this returns."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANNOUNCE_S):
                await self._registry.models.table.until(
                    model_id,
                    lambda record: record is None or bool(record.instance_ids.keys() - avoid or record.failed_in),
                )

    async def _choose(self, model_id: str, record: ModelRecord, pods: Mapping[str, InstanceRecord]) -> Pod | None:
        size_bytes = await self._runtime.predict_size(model_id, record.info) if self._monitor.is_serving else None
        limits = self._monitor.limits
        now_ms = epoch_ms()
        constraint = self._constraints.of(record.info.type)
        allowed = {pod_id for pod_id in pods if constraint.allows(self._labels(pod_id, pods))}
        most = max((constraint.num_preferred(self._labels(pod_id, pods)) for pod_id in allowed), default=0)
        candidates = [
            self._own_pod() if pod_id == self._own_id else _pod(pod_id, pod)
            for pod_id, pod in pods.items()
            if pod_id in allowed
            and constraint.num_preferred(self._labels(pod_id, pods)) == most
            and may_load(record, pod_id, now_ms=now_ms, expiry_s=self._failure_expiry_s)
            and (not self._states.is_quarantined(model_id) if pod_id == self._own_id else pod.http_address)
        ]
        return choose_pod(candidates, size_bytes or (limits.default_model_size_bytes if limits else 0))

    def _own_pod(self) -> Pod:
        usage = self._copies.usage()
        return Pod(
            self._own_id,
            True,
            usage.capacity_bytes,
            usage.free_bytes,
            usage.lru_ms,
            len(self._copies),
            self._loads.num_loading,
        )

    async def _outcome(self, model_id: str, avoid: frozenset[str]) -> StatusInfo:
        started_s = time.monotonic()
        while True:
            task = self._loads.task(model_id)
            if task is not None:
                # asyncio.shield would cancel the waiters of a load that is cancelled.
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
                return self._states.status(model_id)
            status = self._states.status(model_id, besides=avoid)
            starting = status.status is ModelStatus.NOT_LOADED and time.monotonic() - started_s < _REMOTE_START_S
            if status.status is not ModelStatus.LOADING and not starting:
                return status
            await self._changes.wait(_REMOTE_START_S)

    def _labels(self, pod_id: str, pods: Mapping[str, InstanceRecord]) -> tuple[str, ...]:
        if pod_id == self._own_id:
            return self._own_labels
        return pods[pod_id].labels if pod_id in pods else ()


def _pod(pod_id: str, pod: InstanceRecord) -> Pod:
    capacity_bytes, used_bytes = pod.capacity_units * CAPACITY_UNIT_BYTES, pod.used_units * CAPACITY_UNIT_BYTES
    return Pod(
        pod_id,
        False,
        capacity_bytes,
        max(0, capacity_bytes - used_bytes),
        pod.lru_time_ms,
        pod.count,
        pod.loads_in_progress,
    )
