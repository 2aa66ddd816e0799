"""Estimates the duration of a load from the loads that this pod has done."""

from dataclasses import dataclass, replace

_NEW_WEIGHT = 0.5  # of the newest measurement in a model's mean
_DEFAULT_S = 10.0  # before anything was measured
_FLOOR_S = 0.05


@dataclass(frozen=True, slots=True)
class _Mean:
    seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Mean durations by model. Immutable: each measurement returns a new object."""

    by_model: tuple[tuple[str, _Mean], ...] = ()

    def measured(self, model_id: str, size_bytes: int, seconds: float) -> "LoadTimes":
        known = dict(self.by_model)
        before = known.pop(model_id, None)
        mean_s = seconds if before is None else before.seconds + _NEW_WEIGHT * (seconds - before.seconds)
        return replace(self, by_model=(*known.items(), (model_id, _Mean(mean_s, size_bytes))))

    def without(self, model_id: str) -> "LoadTimes":
        return replace(self, by_model=tuple(item for item in self.by_model if item[0] != model_id))

    def expected_s(self, model_id: str, size_bytes: int = 0) -> float:
        """Return the model's own mean, else an estimate from its size and the other loads, else their mean, else a default."""
        known = dict(self.by_model)
        own = known.get(model_id)
        if own is not None:
            return max(_FLOOR_S, own.seconds)
        if not known:
            return _DEFAULT_S
        total_s = sum(mean.seconds for mean in known.values())
        total_bytes = sum(mean.size_bytes for mean in known.values())
        if size_bytes and total_bytes:
            return max(_FLOOR_S, total_s * size_bytes / total_bytes)
        return max(_FLOOR_S, total_s / len(known))


def remaining_s(expected_s: float, elapsed_s: float, progress: float) -> float:
    """Estimate the rest of a load that has run for `elapsed_s`. `progress` is 0 if unknown. An overdue load gets half its time again."""
    if progress > 0.05:
        return max(_FLOOR_S, elapsed_s * (1 - progress) / progress)
    if elapsed_s < expected_s:
        return expected_s - elapsed_s
    return max(_FLOOR_S, elapsed_s / 2)


def retry_after_s(expected_wait_s: float) -> float:
    """Return a Retry-After hint: whole seconds from 1 to 120."""
    return float(min(120, max(1, round(expected_wait_s))))
