"""Computes the state of a model: on this pod, over all pods, and how long a request for it would wait."""

import time
from collections.abc import Callable, Set

from common.model_state import CopyState
from mesh.placement.copies import LocalCopies
from mesh.placement.eviction import plan_eviction
from mesh.placement.failures import SeenTimes, blocked_for_s, num_failures, wait_s
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.load_times import remaining_s
from mesh.placement.loads import LocalLoads
from mesh.placement.model_status import LocalCopyState, status_of
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import InstanceRecord, ModelRecord
from mesh.registry.registry import Registry
from mesh.types import ModelStatus, StatusInfo


class ModelStates:
    """Reads the registry, this pod's copies and loads, and its runtime's state. Changes nothing."""

    def __init__(
        self,
        registry: Registry,
        copies: LocalCopies,
        loads: LocalLoads,
        monitor: RuntimeMonitor,
        learned: LearnedCopies,
        *,
        failure_expiry_s: float,
        is_usable: Callable[[str], bool],
    ) -> None:
        """`is_usable` returns False for a pod that does not answer this one."""
        self._registry = registry
        self._copies = copies
        self._loads = loads
        self._monitor = monitor
        self._learned = learned
        self._failure_expiry_s = failure_expiry_s
        self._is_usable = is_usable
        self._own_id = registry.instances.own_id
        self._failures = SeenTimes()
        self._starts = SeenTimes()
        registry.models.table.listen(self._record_changed)

    def record(self, model_id: str, *, as_recorded: bool = False) -> ModelRecord | None:
        """Return the model's record with what was learned while the store was away. `as_recorded`: without other pods' copies that it does not list."""
        record = self._registry.models.get(model_id)
        return record and self._learned.applied_to(model_id, record, with_copies=not as_recorded)

    def status(self, model_id: str, *, besides: Set[str] = frozenset(), as_recorded: bool = False) -> StatusInfo:
        """Return the model's state over all pods but `besides`. `as_recorded`: as in `record`."""
        record = self.record(model_id, as_recorded=as_recorded)
        pods = self.pods() if record is not None and record.instance_ids else {}
        return status_of(
            model_id,
            record,
            own_id=self._own_id,
            own=None if self._own_id in besides else self.local_copy(model_id),
            own_model=self._monitor.model(model_id),
            pods=self._learned.without_old_reports(
                model_id, {pod_id: pod for pod_id, pod in pods.items() if pod_id not in besides}
            ),
        )

    def expected_wait_s(self, model_id: str) -> float:
        copy = self._copies.get(model_id)
        if copy is not None and copy.is_loaded:
            return 0.0 if self._monitor.is_serving else 1.0
        expected_s = self._loads.times.expected_s(model_id, copy.size_bytes if copy else 0)
        if copy is None or copy.state is CopyState.UNLOADING:
            since_s = max(self._remote_for_s(model_id), default=None)
            if since_s is not None:
                return remaining_s(expected_s, since_s, 0.0)
            limits = self._monitor.limits
            return expected_s * (1 + self._loads.num_loading / (limits.max_loading_concurrency if limits else 1))
        model = self._monitor.model(model_id)
        if copy.state is CopyState.QUEUED and (room_s := self._loads.room_wait_s()) is not None:
            return room_s + expected_s  # Models in use must be idle first.
        progress = model.progress if model is not None and model.state is CopyState.LOADING else 0.0
        return remaining_s(expected_s, time.monotonic() - copy.started_s, progress)

    def would_unload(self, model_id: str, size_bytes: int) -> tuple[str, ...]:
        """Return the models that this pod would unload for an urgent load of this size. Models in use are last."""
        copy = self._copies.get(model_id)
        if copy is not None and copy.is_loaded:
            return ()
        return plan_eviction(self._copies.usage(), model_id, size_bytes, spare_busy=False).victims

    def expected_load_s(self, model_id: str) -> float:
        """Return the expected seconds of a whole load."""
        return self._loads.times.expected_s(model_id)

    def is_quarantined(self, model_id: str) -> bool:
        """Return whether the runtime has quarantined the model. Only an explicit load request loads it again."""
        model = self._monitor.model(model_id)
        return model is not None and model.state is CopyState.QUARANTINED

    def record_blocked_for_s(self, model_id: str, record: ModelRecord) -> float:
        """Return the seconds until some pod may try to load the model."""
        if not record.failed_in:
            return 0.0
        candidates = {self._own_id, *self.pods()} - ({self._own_id} if self.is_quarantined(model_id) else set())
        ages_s = self._failures.ages_s(model_id, record.failed_in)
        return blocked_for_s(num_failures(record), ages_s, candidates, self._failure_expiry_s)

    def may_load(self, model_id: str, record: ModelRecord, instance_id: str) -> bool:
        """Return whether a pod may try to load the model: it has not failed, or its backoff is over."""
        ages_s = self._failures.ages_s(model_id, record.failed_in)
        return not wait_s(num_failures(record), ages_s, instance_id, self._failure_expiry_s)

    def loading_for_s(self, model_id: str, instance_id: str) -> float:
        """Return how long this pod has known that another one has the model or loads it."""
        record = self.record(model_id)
        return self._starts.ages_s(model_id, record.instance_ids).get(instance_id, 0.0) if record is not None else 0.0

    def blocked_for_s(self, model_id: str) -> float:
        """Return the seconds until a failed model may be loaded again without an explicit load request."""
        record = self.record(model_id)
        return self.record_blocked_for_s(model_id, record) if record else 0.0

    def local_status(self, model_id: str) -> ModelStatus:
        if self._loads.task(model_id) is not None:
            return ModelStatus.LOADING
        copy = self._copies.get(model_id)
        return ModelStatus.LOADED if copy is not None and copy.is_loaded else ModelStatus.NOT_LOADED

    def local_copy(self, model_id: str) -> LocalCopyState | None:
        copy = self._copies.get(model_id)
        if copy is None:
            return None
        # A copy that is unloaded while its next load waits counts as queued.
        state = CopyState.QUEUED if copy.state is CopyState.UNLOADING and self._loads.task(model_id) else copy.state
        return LocalCopyState(state, copy.started_ms, copy.size_bytes, self._monitor.model(model_id))

    def pods(self) -> dict[str, InstanceRecord]:
        """Return the pods that accept work and answer this pod."""
        return {pod_id: pod for pod_id, pod in self._registry.instances.live() if self._is_usable(pod_id)}

    def others(self) -> Set[str]:
        """Return the ids of the other pods that requests can be forwarded to."""
        return {pod_id for pod_id, pod in self.pods().items() if pod_id != self._own_id and pod.grpc_address}

    def _remote_for_s(self, model_id: str) -> list[float]:
        record = self.record(model_id)
        if record is None:
            return []
        pods = self.pods()
        ages_s = self._starts.ages_s(model_id, record.instance_ids)
        return [age_s for pod_id, age_s in ages_s.items() if pod_id in pods and pod_id != self._own_id]

    def _record_changed(self, model_id: str, _: ModelRecord | None, new: ModelRecord | None) -> None:
        if new is None:
            self._failures.forget(model_id)
            self._starts.forget(model_id)
        else:
            self._failures.ages_s(model_id, new.failed_in)
            self._starts.ages_s(model_id, new.instance_ids)
