"""Judges copies by the outcome and the latency of this pod's own requests to them: outlier ejection, with probing.

The outcomes at all copies of a pod count for the pod too, so that a failing pod is not detected once more for each of its copies.
"""

import time
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from mesh.routing.attempts import Attempt, Outcome

_FAILURES_TO_EJECT = 3
_EJECTION_S = 5.0
_MAX_DOUBLINGS = 4
_NEW_WEIGHT = 0.3  # of the newest latency in the mean
_MIN_SAMPLES = 3
_HALF_LIFE_S = 10.0  # of what is held against a slow copy, so that it is tried again
_MIN_PATIENCE_S = 2.0  # a caller that disconnects sooner is not counted as a failure of the copy
_SLOW_FACTOR = 2.0
_SLOW_S = 0.2


class CopyRecord(msgspec.Struct, frozen=True):
    """What is known of one copy. Times are on the monotonic clock.

    Attributes:
        latency_s: moving mean of the time to the first byte.
        failures: failures in a row.
        ejections: ejections since the last answer.
    """

    latency_s: float = 0.0
    samples: int = 0
    measured_at_s: float = 0.0
    failures: int = 0
    ejections: int = 0
    ejected_until_s: float = 0.0

    def answered(self, latency_s: float, now_s: float) -> "CopyRecord":
        weight = max(_NEW_WEIGHT, 1 / (self.samples + 1))
        mean_s = self.latency_s + weight * (latency_s - self.latency_s)
        return CopyRecord(mean_s, self.samples + 1, now_s)

    def failed(self, now_s: float) -> "CopyRecord":
        failures = self.failures + 1
        if failures < _FAILURES_TO_EJECT or self.is_ejected(now_s):
            return replace(self, failures=failures)
        until_s = now_s + _EJECTION_S * 2 ** min(self.ejections, _MAX_DOUBLINGS)
        return replace(self, failures=failures, ejections=self.ejections + 1, ejected_until_s=until_s)

    def is_ejected(self, now_s: float) -> bool:
        return now_s < self.ejected_until_s

    def probed(self, now_s: float) -> "CopyRecord":
        """Let one request through after an ejection: the copy stays ejected for the others until that request's outcome is known."""
        if self.failures < _FAILURES_TO_EJECT or self.is_ejected(now_s):
            return self
        return replace(self, ejected_until_s=now_s + _EJECTION_S)

    def excess_s(self, best_s: float, now_s: float) -> float:
        """Return by how much the copy is slower than the best one, halved every 10 s since the last measurement."""
        if self.samples < _MIN_SAMPLES or self.latency_s < _SLOW_FACTOR * best_s + _SLOW_S:
            return 0.0
        return float((self.latency_s - best_s) * 0.5 ** ((now_s - self.measured_at_s) / _HALF_LIFE_S))


_NEW = CopyRecord()


class CopyHealth:
    """Records by model and pod, and one for each pod."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, CopyRecord]] = {}
        self._pods: dict[str, CopyRecord] = {}
        self._failing: set[tuple[str, str]] = set()  # copies whose last request has failed, by model and pod

    @property
    def is_clean(self) -> bool:
        """Whether the last requests to all copies and pods have been answered, so that none is ejected or probed."""
        return not self._failing and not self._pods

    def record(self, attempt: Attempt) -> None:
        """Take the outcome of an attempt into account."""
        now_s = time.monotonic()
        pod_id = attempt.target.instance_id
        known = self._records.setdefault(attempt.model_id, {})
        before = known.get(pod_id, _NEW)
        outcome = attempt.outcome
        if outcome is Outcome.ANSWERED:
            self._pods.pop(pod_id, None)
            if attempt.target.is_loaded:
                known[pod_id] = before.answered(attempt.waited_s, now_s)
                self._failing.discard((attempt.model_id, pod_id))
        elif outcome is Outcome.FAILED or (
            outcome is Outcome.ABANDONED
            and attempt.target.is_loaded
            and attempt.waited_s >= max(_MIN_PATIENCE_S, 2 * before.latency_s)
        ):
            known[pod_id] = before.failed(now_s)
            self._failing.add((attempt.model_id, pod_id))
            self._pods[pod_id] = self._pods.get(pod_id, _NEW).failed(now_s)
        if not known:
            del self._records[attempt.model_id]

    def of(self, model_id: str, instance_id: str) -> CopyRecord:
        return self._records.get(model_id, {}).get(instance_id, _NEW)

    def is_ejected(self, model_id: str, instance_id: str, now_s: float) -> bool:
        """Return whether the last requests to the copy have failed, or those to any copies of its pod."""
        return self.of(model_id, instance_id).is_ejected(now_s) or self._pods.get(instance_id, _NEW).is_ejected(now_s)

    def best_s(self, model_id: str, instance_ids: Iterable[str]) -> float:
        """Return the lowest mean latency of these copies. A copy without enough measurements counts as 0 s, so that it is tried."""
        records = [self.of(model_id, instance_id) for instance_id in instance_ids]
        return min((record.latency_s if record.samples >= _MIN_SAMPLES else 0.0 for record in records), default=0.0)

    def chosen(self, model_id: str, instance_id: str) -> None:
        """Note that a request goes to the copy."""
        now_s = time.monotonic()
        for records in (self._records.get(model_id, {}), self._pods):
            if (record := records.get(instance_id)) is not None and record.failures:
                records[instance_id] = record.probed(now_s)

    def forget(self, model_id: str) -> None:
        for pod_id in self._records.pop(model_id, {}):
            self._failing.discard((model_id, pod_id))
