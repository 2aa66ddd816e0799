"""Limits the rate and the concurrency of each key's inference requests on one pod."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from mesh.access.api_keys import ApiKey
from mesh.errors import Overloaded

_MINUTE_S = 60.0
_BURST_S = 10.0  # The requests of this time may arrive at once.


@dataclass(slots=True)
class _Use:
    """`due_s`: when the bucket is full again. `running`: requests that have not ended."""

    due_s: float = 0.0
    running: int = 0


class Quotas:
    """Counts by the key's name, so that a change of the key file resets nothing. `now_s` is a monotonic clock."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._uses: dict[str, _Use] = {}

    def begin(self, key: ApiKey) -> Callable[[], None] | None:
        """Count a request, and return the function to call once it has ended; None for a key without limits.

        Raises Overloaded with a retry hint.
        """
        if not key.requests_per_minute and not key.max_concurrent:
            return None
        use = self._uses.setdefault(key.name, _Use())
        if key.max_concurrent and use.running >= key.max_concurrent:
            raise Overloaded(
                f"key {key.name}: {use.running} requests are running; the limit is {key.max_concurrent}",
                limit=key.max_concurrent,
                value=use.running,
                retry_after_s=1.0,
            )
        if key.requests_per_minute:
            self._take(key, use)
        use.running += 1
        is_ended = False

        def end() -> None:
            nonlocal is_ended
            if not is_ended:
                is_ended = True
                use.running -= 1

        return end

    def _take(self, key: ApiKey, use: _Use) -> None:
        """Take a token from the key's bucket, which holds the tokens of ten seconds, and at least one."""
        interval_s = _MINUTE_S / key.requests_per_minute
        now_s = self._now_s()
        due_s = max(use.due_s, now_s) + interval_s
        wait_s = due_s - now_s - max(_BURST_S, interval_s)
        if wait_s > 1e-9:
            raise Overloaded(
                f"key {key.name}: more than {key.requests_per_minute} requests per minute",
                limit=key.requests_per_minute,
                retry_after_s=wait_s,
            )
        use.due_s = due_s
