"""Decides when an engine process is restarted, when it counts as hung, and when restarting is given up."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Settings of the supervisor, in seconds and counts.

    Attributes:
        first_s, most_s: the pause before a restart. It doubles with each crash, and is `first_s` again after an engine has run for `healthy_s`.
        max_failed_starts: the failed starts in a row after which restarting is given up; `max_first_starts` if no engine was ever ready.
        silence_s: an engine that has work and sends nothing for this long is killed. 0 stands for the device's default, a negative value for never.
    """

    first_s: float = 0.2
    most_s: float = 15.0
    healthy_s: float = 60.0
    start_timeout_s: float = 300.0
    max_failed_starts: int = 8
    max_first_starts: int = 2
    silence_s: float = 0.0

    def silence_on(self, device: str) -> float:
        """Return the limit on a device; not positive for no limit.

        One step of a large model may take an hour on a CPU. On a GPU only the compilation of a kernel takes minutes.
        """
        return self.silence_s or (-1.0 if device == "cpu" else 300.0)


class Silence:
    """Counts for how long an engine that has work has sent nothing.

    The count is of observations and not of the clock: after a pause of this process, what the engine sent is still unread.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._silent_s = 0.0

    def exceeds_limit(self, observed_s: float, *, heard: bool, has_work: bool) -> bool:
        """Add an observation of `observed_s` seconds, and return whether the silence before its end has reached the limit."""
        self._silent_s = 0.0 if heard or not has_work else self._silent_s + observed_s
        return self._silent_s >= self._limit_s
