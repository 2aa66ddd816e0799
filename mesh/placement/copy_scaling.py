"""Decides whether a model needs another copy, and whether a pod should drop its own."""

from dataclasses import dataclass
from enum import StrEnum

from common.model_key import CopySettings

QUEUED_S = 3.0  # a copy is added after requests have queued for this time
IDLE_S = 60.0  # one of several copies is dropped after it has been idle for this time


class Change(StrEnum):
    NONE = "none"
    ADD = "add"  # load a copy on another pod
    DROP = "drop"  # unload this pod's copy


@dataclass(frozen=True, slots=True)
class CopyLoad:
    """A loaded copy as its pod sees it.

    Attributes:
        num_copies: pods that have the model or load it, this one included.
        num_pods: pods that may hold a copy.
        is_first: this pod decides about additions, and keeps its copy longest.
        queued_s: how long requests have queued at this copy without a pause.
        idle_s: how long the copy has had no request.
    """

    num_copies: int
    num_pods: int
    is_first: bool
    queued_s: float
    idle_s: float


def plan_copies(load: CopyLoad, settings: CopySettings) -> Change:
    most = min(settings.max_copies or load.num_pods, load.num_pods)
    least = min(settings.min_copies, load.num_pods)
    if settings.idle_timeout_s and load.idle_s >= settings.idle_timeout_s and not least:
        return Change.DROP
    if load.is_first:
        wants_more = load.num_copies < least or (load.queued_s >= QUEUED_S and load.num_copies < most)
        return Change.ADD if wants_more else Change.NONE
    if load.num_copies > max(1, most):
        return Change.DROP
    is_surplus = load.num_copies > max(1, least) and load.idle_s >= IDLE_S
    return Change.DROP if is_surplus else Change.NONE
