"""Measures the bandwidth of the link from host memory to the device."""

_GUESSED_BYTES_PER_S = 40e9  # until something was measured


class LinkRate:
    """The fastest copy of weights so far. The engine notices the end of a copy late, never early, so others only seem slower."""

    def __init__(self) -> None:
        self._measured = 0.0

    @property
    def bytes_per_s(self) -> float:
        return self._measured or _GUESSED_BYTES_PER_S

    def observe(self, num_bytes: int, seconds: float) -> None:
        """Learn from a copy that had ended after `seconds`."""
        if seconds > 0:
            self._measured = max(self._measured, num_bytes / seconds)
