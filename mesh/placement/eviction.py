"""Whom to unload so that a model fits: least recently used first, never one in use while there is another way. Pure."""

from dataclasses import dataclass

from mesh.placement.usage import Held, Usage


@dataclass(frozen=True, slots=True)
class Room:
    """`victims` are to be unloaded, in this order. `wait`: there isn't room yet, look again after a change. `refusal`: there never will be.

    `declined`: what would have to leave was used more recently than the newcomer.
    """

    victims: tuple[str, ...] = ()
    wait: bool = False
    refusal: str = ""
    declined: bool = False


def make_room(
    usage: Usage, model_id: str, need_bytes: int, *, last_used_ms: int | None = None, patient: bool = True
) -> Room:
    """Room for `need_bytes` beside what is held; the model's own entry doesn't count.

    `last_used_ms`: None for a model that is wanted now; otherwise it displaces only what was used longer ago.
    `patient` False: models in use may be victims too, when the idle ones don't suffice (they end what they run first).
    """
    if need_bytes > usage.capacity_bytes:
        return Room(refusal=f"it needs {need_bytes} bytes; the capacity is {usage.capacity_bytes} bytes")
    others = [held for held in usage.held if held.model_id != model_id]
    used_bytes = sum(held.size_bytes for held in others)
    short_bytes = used_bytes + need_bytes - usage.capacity_bytes
    if short_bytes <= 0:
        return Room()
    short_bytes -= sum(held.size_bytes for held in others if held.leaving)
    if short_bytes <= 0:
        return Room(wait=True)
    candidates = [held for held in others if not held.leaving and not held.pinned and held.size_bytes > 0]
    if last_used_ms is not None:
        candidates = [held for held in candidates if held.last_used_ms < last_used_ms]
        if sum(held.size_bytes for held in candidates) < short_bytes:
            return Room(declined=True)
    idle = _take([held for held in candidates if held.users == 0], short_bytes)
    if idle is not None:
        return Room(victims=idle, wait=True)
    if patient:
        return Room(wait=True)
    # idle ones go first, then those in use, each group by last use
    by_use = sorted(candidates, key=lambda held: (held.users > 0, held.last_used_ms, held.model_id))
    return Room(victims=_take(by_use, short_bytes, ordered=True) or (), wait=True)


def _take(candidates: list[Held], short_bytes: int, *, ordered: bool = False) -> tuple[str, ...] | None:
    """The first few, by last use, that free enough; without those that turn out not to be needed. None: all together don't."""
    chosen: list[Held] = []
    for held in candidates if ordered else sorted(candidates, key=lambda held: (held.last_used_ms, held.model_id)):
        chosen.append(held)
        if sum(victim.size_bytes for victim in chosen) >= short_bytes:
            break
    else:
        return None
    for held in reversed(chosen[:-1]):
        if sum(victim.size_bytes for victim in chosen) - held.size_bytes >= short_bytes:
            chosen.remove(held)
    return tuple(held.model_id for held in chosen)
