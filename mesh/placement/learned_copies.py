"""Keeps what the records of models would say while the store is away: what other pods answer about their copies, and this pod's failures."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from common.clock import epoch_ms
from mesh.registry.records import Failure, InstanceRecord, ModelRecord

_KEPT_S = 15.0  # after the store is back: each pod corrects its part of the records within 10 s
_REFUSED_S = 10.0  # how long a pod that has lost a model after a load is not asked to load it again


@dataclass(slots=True)
class _Learned:
    """What was learned of one model, by pod.

    Attributes:
        gained_ms: when the pod began a load.
        lost_ms: the time in the model's record of a load that has been lost since.
        refused_s: when the pod lost the model after it was asked to load it, on the monotonic clock.
        failed_ms, failures: the failures of this pod.
    """

    gained_ms: dict[str, int] = field(default_factory=dict)
    lost_ms: dict[str, int] = field(default_factory=dict)
    refused_s: dict[str, float] = field(default_factory=dict)
    failed_ms: dict[str, int] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


class LearnedCopies:
    def __init__(self, is_store_away: Callable[[], bool]) -> None:
        """`is_store_away`: whether records cannot be written now, so that other pods do not see what this pod loads."""
        self.is_store_away = is_store_away
        self._learned: dict[str, _Learned] = {}
        self._back_since_s: float | None = None

    def gained(self, model_id: str, instance_id: str) -> None:
        """Record that a pod has the model or loads it, as it has answered."""
        if learned := self._of(model_id):
            learned.gained_ms[instance_id] = epoch_ms()

    def lost(self, model_id: str, instance_id: str, since_ms: int) -> None:
        """Record that a pod answered that it does not have the model. `since_ms`: the pod's time in the model's record, 0 if it is not listed."""
        # A copy that was learned of earlier can also be lost after the store is back.
        if learned := self._of(model_id) or self._learned.get(model_id):
            learned.lost_ms[instance_id] = since_ms
            if learned.gained_ms.pop(instance_id, 0):
                learned.refused_s[instance_id] = time.monotonic()

    def left(self, model_id: str, instance_id: str) -> None:
        """Record that this pod gives up its copy. Like the others, which find that out when they call it, it then prefers another pod."""
        if learned := self._of(model_id):
            learned.refused_s[instance_id] = time.monotonic()

    def failed(self, model_id: str, instance_id: str, failure: Failure) -> None:
        """Record that a load on this pod has failed."""
        if learned := self._of(model_id):
            learned.failed_ms[instance_id] = epoch_ms()
            learned.failures[instance_id] = failure

    def refuses(self, model_id: str, instance_id: str) -> bool:
        """Return whether a pod lost the model soon after it was asked to load it: the load failed, or others displace the model."""
        learned = self._learned.get(model_id)
        at_s = learned.refused_s.get(instance_id) if learned is not None else None
        return at_s is not None and time.monotonic() - at_s < _REFUSED_S

    def applied_to(self, model_id: str, record: ModelRecord, *, with_copies: bool = True) -> ModelRecord:
        """Return the record with what was learned while the store was away. `with_copies` False: without other pods' copies that it does not list."""
        learned = self._known(model_id)
        if learned is None:
            return record
        pods = {
            pod_id: since_ms
            for pod_id, since_ms in record.instance_ids.items()
            if learned.lost_ms.get(pod_id) != since_ms
        }
        return msgspec.structs.replace(
            record,
            instance_ids={**pods, **learned.gained_ms} if with_copies else pods,
            failed_in={**record.failed_in, **learned.failed_ms},
            failures={**record.failures, **learned.failures},
        )

    def without_old_reports(self, model_id: str, pods: Mapping[str, InstanceRecord]) -> Mapping[str, InstanceRecord]:
        """Return the pods without their reports on copies that they gained afterwards."""
        learned = self._known(model_id)
        if learned is None:
            return pods
        return {
            pod_id: msgspec.structs.replace(
                pod, copies={name: report for name, report in pod.copies.items() if name != model_id}
            )
            if pod_id in learned.gained_ms
            else pod
            for pod_id, pod in pods.items()
        }

    def _of(self, model_id: str) -> _Learned | None:
        """Return what to add to; None while the records say everything."""
        if not self.is_store_away():
            return None
        self._back_since_s = None
        return self._learned.setdefault(model_id, _Learned())

    def _known(self, model_id: str) -> _Learned | None:
        if not self._learned:
            return None
        if self.is_store_away():
            self._back_since_s = None
        elif self._back_since_s is None:
            self._back_since_s = time.monotonic()
        elif time.monotonic() - self._back_since_s >= _KEPT_S:
            self._learned.clear()
        return self._learned.get(model_id)
