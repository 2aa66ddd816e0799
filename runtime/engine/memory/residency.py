"""Chooses the models to evict, and the busy models to drain.

The model goes first whose return is expected to cost least per slab that it frees: its decayed uses (recency and frequency in one number) times the
seconds of its return, which are more from disk than from the host tier. A model with running rows is never evicted,
only drained: it admits no requests until its rows have ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.eviction_worth import eviction_worth

_LEAST_PATIENCE_S = 1.0
_SWAPS_OF_PATIENCE = (
    3.0  # a stay lasts at least this many swaps, so that swapping never costs more than a quarter of the time
)


@dataclass(frozen=True, slots=True)
class Holder:
    """The facts of a resident model that decide its eviction. `slabs`: what evicting its weights frees. `use`: its decayed uses."""

    model_id: str
    slabs: int
    last_used_s: float
    resident_since_s: float
    return_cost_s: float
    swapping: bool  # its weights are on their way to the device, and cannot leave before they have arrived
    running: int
    waiting: int
    draining: bool = False
    use: float = 0.0

    @property
    def evictable(self) -> bool:
        return not self.swapping and not self.running and (self.draining or not self.waiting)


def choose_victims(holders: Sequence[Holder], slabs: int) -> list[str] | None:
    """Return models whose eviction frees at least `slabs`, none of them needlessly, or None if all evictable ones do not suffice."""
    ranked = sorted((h for h in holders if h.evictable), key=_worth)
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
    """Return how long requests of a model wait before a busy model is drained, and how long that model may stay at least."""
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


def _worth(holder: Holder) -> tuple[float, float]:
    """Order holders by what keeping them saves per slab, then by recency."""
    return eviction_worth(holder.use, holder.return_cost_s, holder.slabs), holder.last_used_s
