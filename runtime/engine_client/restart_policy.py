"""When an engine process is given up, killed or started again. Pure; the supervising is engine_client's."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Back-off doubles from `first_s` to `most_s` and starts anew after `healthy_s` of life; `max_failed_starts` in a row is giving up,
    or `max_first_starts` for an engine that was never ready.

    `silence_s`: an engine that has work and tells nothing for so long hangs, and is killed; 0 = chosen by the device, negative = never.
    """

    first_s: float = 0.2
    most_s: float = 15.0
    healthy_s: float = 60.0
    start_timeout_s: float = 300.0
    max_failed_starts: int = 8
    max_first_starts: int = 2
    silence_s: float = 0.0

    def silence_on(self, device: str) -> float:
        """Not positive: for ever. One step of a large model may take an hour on a CPU; on a GPU only a kernel's compilation takes minutes."""
        return self.silence_s or (-1.0 if device == "cpu" else 300.0)
