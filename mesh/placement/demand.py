"""Decides whether a load still needs the room that other models are evicted for."""

from collections.abc import Callable


class Demand:
    """Whether a load still needs room: it waits for it, and some request waits for the model or none ever did (an explicit load)."""

    def __init__(self, num_waiting: Callable[[], int]) -> None:
        self._num_waiting = num_waiting
        self._had_waiters = False
        self._closed = False

    def is_present(self) -> bool:
        waiting = self._num_waiting() > 0
        self._had_waiters = self._had_waiters or waiting
        return not self._closed and (waiting or not self._had_waiters)

    def close(self) -> None:
        self._closed = True
