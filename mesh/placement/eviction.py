"""Whom to unload so that a model fits: least recently used first, never one in use while there is another way. Pure."""

from dataclasses import dataclass

from mesh.placement.usage import ModelUsage, Usage


@dataclass(frozen=True, slots=True)
class Eviction:
    """`victims` are to be unloaded, in this order. `wait`: there isn't room yet, look again after a change. `refusal`: there never will be.

    `declined`: what would have to leave was used more recently than the newcomer.
    """

    victims: tuple[str, ...] = ()
    wait: bool = False
    refusal: str = ""
    declined: bool = False


def plan_eviction(
    usage: Usage, model_id: str, need_bytes: int, *, last_used_ms: int | None = None, spare_busy: bool = True
) -> Eviction:
    """Room for `need_bytes` beside what is held; the model's own entry doesn't count.

    `last_used_ms`: None for a model that is wanted now; otherwise it displaces only what was used longer ago.
    `spare_busy` False: models in use may be victims too, when the idle ones don't suffice (they end what they run first).
    """
    if need_bytes > usage.capacity_bytes:
        return Eviction(refusal=f"it needs {need_bytes} bytes; the capacity is {usage.capacity_bytes} bytes")
    others = [model for model in usage.models if model.model_id != model_id]
    used_bytes = sum(model.size_bytes for model in others)
    short_bytes = used_bytes + need_bytes - usage.capacity_bytes
    if short_bytes <= 0:
        return Eviction()
    short_bytes -= sum(model.size_bytes for model in others if model.is_unloading)
    if short_bytes <= 0:
        return Eviction(wait=True)
    candidates = [model for model in others if not model.is_unloading and not model.is_loading and model.size_bytes > 0]
    if last_used_ms is not None:
        candidates = [model for model in candidates if model.last_used_ms < last_used_ms]
        if sum(model.size_bytes for model in candidates) < short_bytes:
            return Eviction(declined=True)
    idle = _take([model for model in candidates if model.num_users == 0], short_bytes)
    if idle is not None:
        return Eviction(victims=idle, wait=True)
    if spare_busy:
        return Eviction(wait=True)
    # idle ones go first, then those in use, each group by last use
    by_use = sorted(candidates, key=lambda model: (model.num_users > 0, model.last_used_ms, model.model_id))
    return Eviction(victims=_take(by_use, short_bytes, ordered=True) or (), wait=True)


def _take(candidates: list[ModelUsage], short_bytes: int, *, ordered: bool = False) -> tuple[str, ...] | None:
    """The first few, by last use, that free enough; without those that turn out not to be needed. None: all together don't."""
    chosen: list[ModelUsage] = []
    for model in candidates if ordered else sorted(candidates, key=lambda model: (model.last_used_ms, model.model_id)):
        chosen.append(model)
        if sum(victim.size_bytes for victim in chosen) >= short_bytes:
            break
    else:
        return None
    for model in reversed(chosen[:-1]):
        if sum(victim.size_bytes for victim in chosen) - model.size_bytes >= short_bytes:
            chosen.remove(model)
    return tuple(model.model_id for model in chosen)
