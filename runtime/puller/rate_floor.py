"""Ends pulls that are slower than a configured rate, so that a source cannot hold a pull for as long as it likes."""

import time
from collections.abc import Callable

from runtime.errors import LoadFailed

_WINDOW_S = 60.0


class RateFloor:
    """`min_bytes_per_s`: average over each minute; 0 = none. `now_s` is a monotonic clock. Use it from one thread at a time."""

    def __init__(self, min_bytes_per_s: int, origin: str, now_s: Callable[[], float] = time.monotonic) -> None:
        self._min_bytes_per_s = min_bytes_per_s
        self._origin = origin
        self._now_s = now_s
        self._since_s = now_s()
        self._num_bytes = 0

    def arrived(self, num_bytes: int) -> None:
        """Count bytes. Raises LoadFailed if the minute that ends was too slow."""
        self._num_bytes += max(num_bytes, 0)
        passed_s = self._now_s() - self._since_s
        if passed_s < _WINDOW_S:
            return
        rate = self._num_bytes / passed_s
        if rate < self._min_bytes_per_s:
            raise LoadFailed(
                f"{self._origin}: the source sends {rate:.0f} bytes per second; the limit of pull_min_rate_bytes is "
                f"{self._min_bytes_per_s}",
                limit=self._min_bytes_per_s,
                value=rate,
            )
        self._since_s, self._num_bytes = self._now_s(), 0
