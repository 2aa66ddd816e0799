"""Counts requests per minute over the last minutes: `rpm` in a pod's record."""

from collections import deque

_MINUTES = 6
_MINUTE_S = 60.0


class RequestRate:
    """Keeps one count per minute. Times are seconds on any clock that does not go back."""

    def __init__(self, now_s: float) -> None:
        self._started_s = now_s
        self._minutes: deque[tuple[int, int]] = deque(maxlen=_MINUTES + 1)

    def add(self, now_s: float, count: int = 1) -> None:
        minute = int((now_s - self._started_s) / _MINUTE_S)
        if self._minutes and self._minutes[-1][0] == minute:
            self._minutes[-1] = minute, self._minutes[-1][1] + count
        else:
            self._minutes.append((minute, count))

    def per_minute(self, now_s: float) -> int:
        """Return the mean of the running minute and the six before it, or of the time since the start if that is shorter."""
        elapsed_s = now_s - self._started_s
        first = int(elapsed_s / _MINUTE_S) - _MINUTES
        count = sum(number for minute, number in self._minutes if minute >= first)
        window_s = elapsed_s - max(first, 0) * _MINUTE_S
        return round(count * _MINUTE_S / max(window_s, _MINUTE_S))
