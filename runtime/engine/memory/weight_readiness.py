"""Weights on their way in: what a forward pass asks before it reads a group of layers. Knows groups by number; nothing of copies or layers."""

from typing import Protocol


class WeightReadiness(Protocol):
    """One model's weights, group by group."""

    @property
    def pending(self) -> bool:
        """Whether a pass still has to wait for anything. False soon after the last byte came, and then for good until the next eviction."""

    def wait(self, group: int) -> None:
        """Have the current stream wait for groups 0 … `group` (on a CPU: wait). Raises LoadFailed if they will not come."""


class AlwaysReady:
    """Weights that are simply there. Implements Arrival."""

    pending = False

    def wait(self, group: int) -> None:
        """Nothing to wait for."""
