"""What one pod holds, in bytes and in the order of last use. Pure; knows no model's state beyond what counts for room."""

from dataclasses import dataclass

NEVER_MS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """One model's share. `size_bytes`: predicted until it is loaded, then actual. `num_users`: requests in flight, and those that wait for it.

    `is_unloading`: being unloaded, its bytes are coming free. `is_loading`: may not be chosen to leave (it is being loaded).
    """

    model_id: str
    size_bytes: int
    last_used_ms: int
    num_users: int = 0
    is_unloading: bool = False
    is_loading: bool = False


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
    def lru_ms(self) -> int:
        """When the model that is longest unused was used; NEVER_MS if there is none."""
        return min((model.last_used_ms for model in self.models if not model.is_unloading), default=NEVER_MS)
