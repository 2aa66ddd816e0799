"""Interface through which a forward pass waits for groups of weights that are still being copied."""

from typing import Protocol


class WeightReadiness(Protocol):
    """One model's weights, group by group."""

    @property
    def pending(self) -> bool:
        """Whether a pass still has to wait for a group. False from soon after the arrival of the last byte until the next eviction."""

    def wait(self, group: int) -> None:
        """Have the current stream wait for groups 0 … `group` (on a CPU: wait). Raises LoadFailed if they will not come."""


class AlwaysReady:
    """Weights that are always on the device. Implements WeightReadiness."""

    pending = False

    def wait(self, group: int) -> None:
        """Nothing to wait for."""
