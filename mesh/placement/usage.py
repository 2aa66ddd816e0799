"""Describes how much of a pod's capacity its models use, and when each was used last."""

from dataclasses import dataclass

import msgspec

NEVER_MS = 2**63 - 1
HALF_LIFE_USES = (
    500  # of a use: the model that is evicted next has a few uses within it, and a new popularity counts within seconds
)


class ModelUsage(msgspec.Struct, frozen=True, gc=False):
    """One model's share of the capacity.

    Attributes:
        size_bytes: the predicted size until the model is loaded, then the actual one.
        num_users: the number of running requests and of requests that wait for the model.
        is_unloading: the model is being unloaded, so its bytes will be free.
        is_loading: the model is being loaded, so it must not be a victim.
        use: decayed number of uses; models that are used less are evicted first.
        priority: models with a lower one are evicted first.
        is_pinned: the model must not be a victim.
    """

    model_id: str
    size_bytes: int
    last_used_ms: int
    num_users: int = 0
    is_unloading: bool = False
    is_loading: bool = False
    use: float = 0.0
    priority: int = 0
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    capacity_bytes: int
    models: tuple[ModelUsage, ...] = ()

    @property
    def used_bytes(self) -> int:
        return sum(model.size_bytes for model in self.models)

    @property
    def unloading_bytes(self) -> int:
        return sum(model.size_bytes for model in self.models if model.is_unloading)

    @property
    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes)

    @property
    def victim_use(self) -> float:
        """Return the use of the model that is used least; 0 if there is none."""
        return min((model.use for model in self.models if not (model.is_unloading or model.is_pinned)), default=0.0)

    @property
    def lru_ms(self) -> int:
        """Return when the least recently used model was used; NEVER_MS if there is no model."""
        return min((model.last_used_ms for model in self.models if not model.is_unloading), default=NEVER_MS)
