"""Decides when a model that failed to load may be tried again: failures are counted over all pods, with backoff.

A failure's age is the time since this pod saw it. The times in the records come from other machines' clocks and are only compared for equality.
"""

import time
from collections.abc import Mapping, Set

from mesh.registry.records import ModelRecord

MAX_FAILURES = 3  # as in ModelMesh: as many pods try one after the other without a pause
_MAX_BACKOFF_S = 900.0
_MAX_DOUBLINGS = 10


class SeenTimes:
    """When this pod first saw each pod's entry in the records of models."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, tuple[int, float]]] = {}

    def ages_s(self, model_id: str, entries: Mapping[str, int]) -> dict[str, float]:
        """Return the seconds since this pod first saw each entry with its present value. `entries`: a time by pod, as in the record."""
        if not entries:
            self._seen.pop(model_id, None)
            return {}
        now_s = time.monotonic()
        before = self._seen.get(model_id, {})
        seen = {
            pod_id: before[pod_id] if pod_id in before and before[pod_id][0] == value else (value, now_s)
            for pod_id, value in entries.items()
        }
        self._seen[model_id] = seen
        return {pod_id: now_s - at_s for pod_id, (_, at_s) in seen.items()}

    def forget(self, model_id: str) -> None:
        self._seen.pop(model_id, None)


def lost_base_text(base: str) -> str:
    """Return why an adapter cannot be loaded whose base is not registered. It is not recorded, so that a call works as soon as the base is there."""
    return f"FAILED_PRECONDITION: its base {base!r} is not registered; register {base!r}, or remove this adapter"


def num_failures(record: ModelRecord) -> int:
    """Return the number of failures in a row. Java pods do not count them, so each failed pod counts at least once."""
    return max(record.num_failures, len(record.failed_in))


def backoff_s(failures: int, expiry_s: float) -> float:
    """Return the pause after this many failures in a row: `expiry_s`, doubled by each failure after the third, at most 15 minutes."""
    doublings = min(max(0, failures - MAX_FAILURES), _MAX_DOUBLINGS)
    return float(min(max(expiry_s, _MAX_BACKOFF_S), expiry_s * 2.0**doublings))


def wait_s(failures: int, ages_s: Mapping[str, float], instance_id: str, expiry_s: float) -> float:
    """Return the seconds until this pod may try. `ages_s`: the ages of the pods' failures."""
    pause_s = backoff_s(failures, expiry_s)
    if failures >= MAX_FAILURES and ages_s:
        return max(0.0, pause_s - min(ages_s.values()))
    return max(0.0, pause_s - ages_s[instance_id]) if instance_id in ages_s else 0.0


def blocked_for_s(failures: int, ages_s: Mapping[str, float], candidates: Set[str], expiry_s: float) -> float:
    """Return the seconds until the first of the candidates may try."""
    return min((wait_s(failures, ages_s, pod_id, expiry_s) for pod_id in candidates), default=expiry_s)
