"""Chooses the models to evict, and the busy models to drain. Pure functions over plain facts.

The least recently used model goes first, weighed by the cost of its return: a model with a host copy returns faster than one on disk. A model with
running rows is never evicted, only drained: it admits no requests until its rows have ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_RETURN_S = 0.01  # below this all returns are equally cheap
_LEAST_PATIENCE_S = 1.0
_SWAPS_OF_PATIENCE = (
    3.0  # a stay lasts at least this many swaps, so that swapping never costs more than a quarter of the time
)


@dataclass(frozen=True, slots=True)
class Holder:
    """A resident model, as far as its eviction goes. `slabs`: what evicting its weights frees."""

    model_id: str
    slabs: int
    last_used_s: float
    resident_since_s: float
    return_cost_s: float
    swapping: bool  # its weights are on their way to the device, and cannot leave before they have arrived
    running: int
    waiting: int
    draining: bool = False

    @property
    def evictable(self) -> bool:
        return not self.swapping and not self.running and (self.draining or not self.waiting)


def choose_victims(holders: Sequence[Holder], slabs: int, now: float) -> list[str] | None:
    """Models whose eviction frees at least `slabs`, none of them needlessly; None if all that may go are not enough."""
    ranked = sorted((h for h in holders if h.evictable), key=lambda h: _staleness(h, now), reverse=True)
    chosen: list[Holder] = []
    freed = 0
    for holder in ranked:
        if freed >= slabs:
            break
        chosen.append(holder)
        freed += holder.slabs
    if freed < slabs:
        return None
    for holder in reversed(chosen.copy()):
        if freed - holder.slabs >= slabs:
            chosen.remove(holder)
            freed -= holder.slabs
    return [holder.model_id for holder in chosen]


def patience_s(swap_in_s: float, return_cost_s: float) -> float:
    """How long requests of a model wait before a busy one must make way, and how long that one may stay at least."""
    return max(_LEAST_PATIENCE_S, _SWAPS_OF_PATIENCE * (swap_in_s + return_cost_s))


def choose_to_drain(holders: Sequence[Holder], slabs: int, waited_s: float, swap_in_s: float, now: float) -> list[str]:
    """Busy models that must take no new requests until they can be evicted, for one that has waited `waited_s` and lacks `slabs`.

    Empty before the patience of the waiting requests is over, or if draining all busy models would not be enough.
    """
    freed = sum(h.slabs for h in holders if h.evictable or h.draining)
    if freed >= slabs:
        return []  # enough is being freed already
    chosen: list[str] = []
    # The model that has been resident longest is drained first.
    for holder in sorted(holders, key=lambda h: h.resident_since_s):
        if holder.swapping or holder.evictable or holder.draining:
            continue
        patience = patience_s(swap_in_s, holder.return_cost_s)
        if waited_s < patience or now - holder.resident_since_s < patience:
            continue
        chosen.append(holder.model_id)
        freed += holder.slabs
        if freed >= slabs:
            return chosen
    return []


def _staleness(holder: Holder, now: float) -> float:
    return (now - holder.last_used_s) / max(holder.return_cost_s, _LEAST_RETURN_S)
