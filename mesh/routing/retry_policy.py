"""Decides whether a failed attempt to forward a request is followed by another one, and which copies that one avoids."""

from enum import StrEnum

import msgspec
from msgspec.structs import replace


class Failure(StrEnum):
    """Why an attempt brought no response."""

    MODEL_LOST = "model lost"  # the target answered that it does not have the model
    UNAVAILABLE = "unavailable"  # the target is unreachable, restarting or shutting down
    STATUS_LOST = "status lost"  # the transport lost the status with which the call ended


class RetryBudget(msgspec.Struct, frozen=True):
    """What a request may still try, and the instance ids in `exclude` that its next attempt avoids while another copy exists.

    `local_only`: another pod forwarded the request, so that it may not fail over to a third one.
    """

    local_only: bool = False
    reloads: int = 4
    failovers: int = 3
    status_retries: int = 3
    moves: int = 1
    exclude: frozenset[str] = frozenset()

    def after(self, failure: Failure, instance_id: str) -> "RetryBudget | None":
        """Return the budget after an attempt at `instance_id` failed; None if the failure goes to the caller, as the second one of a copy does."""
        if failure is Failure.MODEL_LOST and self.reloads:
            return replace(self, reloads=self.reloads - 1)
        if failure is Failure.STATUS_LOST and self.status_retries:
            return replace(self, status_retries=self.status_retries - 1)
        if (
            failure is Failure.UNAVAILABLE
            and self.failovers
            and not self.local_only
            and instance_id not in self.exclude
        ):
            return replace(self, failovers=self.failovers - 1, exclude=self.exclude | {instance_id})
        return None

    def after_move(self) -> "RetryBudget | None":
        """Return the budget after the name moved to another model, which may also be reloaded at least once; None if it moved before."""
        if not self.moves or self.local_only:
            return None
        return replace(self, moves=self.moves - 1, reloads=max(1, self.reloads))

    @property
    def max_attempts(self) -> int:
        """The number of attempts that can follow, however each of them fails."""
        failovers = 0 if self.local_only else self.failovers
        moves = 0 if self.local_only else self.moves
        return 1 + self.reloads + self.status_retries + failovers + moves
