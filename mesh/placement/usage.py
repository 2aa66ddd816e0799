"""What one pod holds, in bytes and in the order of last use. Pure; knows no model's state beyond what counts for room."""

from dataclasses import dataclass

NEVER_MS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Held:
    """One model's share. `size_bytes`: predicted until it is loaded, then actual. `users`: requests in flight, and those that wait for it.

    `leaving`: being unloaded, its bytes are coming free. `pinned`: may not be chosen to leave (it is being loaded).
    """

    model_id: str
    size_bytes: int
    last_used_ms: int
    users: int = 0
    leaving: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    capacity_bytes: int
    held: tuple[Held, ...] = ()

    @property
    def used_bytes(self) -> int:
        return sum(held.size_bytes for held in self.held)

    @property
    def leaving_bytes(self) -> int:
        return sum(held.size_bytes for held in self.held if held.leaving)

    @property
    def free_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.used_bytes)

    @property
    def lru_ms(self) -> int:
        """When the model that is longest unused was used; NEVER_MS if there is none."""
        return min((held.last_used_ms for held in self.held if not held.leaving), default=NEVER_MS)
