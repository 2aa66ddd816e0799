"""Chooses the models to unload so that another one fits: idle ones before those in use, of lower priority first, least used first."""

from dataclasses import dataclass

from mesh.placement.usage import ModelUsage, Usage


@dataclass(frozen=True, slots=True)
class Eviction:
    """What to do so that a model fits.

    Attributes:
        victims: the models to unload, in this order.
        wait: there is no room yet; plan again after a change.
        never_fits: the model exceeds the whole capacity.
        declined: the models that would have to be unloaded were used more recently than this one.
    """

    victims: tuple[str, ...] = ()
    wait: bool = False
    never_fits: bool = False
    declined: bool = False


def plan_eviction(
    usage: Usage, model_id: str, need_bytes: int, *, last_used_ms: int | None = None, spare_busy: bool = True
) -> Eviction:
    """Plan room for `need_bytes`. The model's own entry in `usage` does not count.

    `last_used_ms`: only models last used before then may be victims; None for a model that is needed now.
    `spare_busy` False: models in use may be victims too, if the idle ones do not suffice. They drain before they are unloaded.
    """
    if need_bytes > usage.capacity_bytes:
        return Eviction(never_fits=True)
    others = [model for model in usage.models if model.model_id != model_id]
    short_bytes = sum(model.size_bytes for model in others) + need_bytes - usage.capacity_bytes
    if short_bytes <= 0:
        return Eviction()
    short_bytes -= sum(model.size_bytes for model in others if model.is_unloading)
    if short_bytes <= 0:
        return Eviction(wait=True)
    candidates = [
        model
        for model in others
        if not (model.is_unloading or model.is_loading or model.is_pinned) and model.size_bytes > 0
    ]
    if last_used_ms is not None:
        candidates = [model for model in candidates if model.last_used_ms < last_used_ms]
        if sum(model.size_bytes for model in candidates) < short_bytes:
            return Eviction(declined=True)
    candidates.sort(key=eviction_order)
    idle = _first_few([model for model in candidates if model.num_users == 0], short_bytes)
    if idle is not None:
        return Eviction(victims=idle, wait=True)
    if spare_busy:
        return Eviction(wait=True)
    return Eviction(victims=_first_few(candidates, short_bytes) or (), wait=True)


def eviction_order(model: ModelUsage) -> tuple[bool, int, float, int, str]:
    """Return the sort key of victims: the first one is evicted first."""
    return (model.num_users > 0, model.priority, model.use, model.last_used_ms, model.model_id)


def _first_few(candidates: list[ModelUsage], short_bytes: int) -> tuple[str, ...] | None:
    """Return the first candidates that free `short_bytes`, without those that larger later ones make unnecessary.

    None if all of them together do not free enough.
    """
    chosen: list[ModelUsage] = []
    freed_bytes = 0
    for model in candidates:
        chosen.append(model)
        freed_bytes += model.size_bytes
        if freed_bytes >= short_bytes:
            break
    else:
        return None
    for model in reversed(chosen[:-1]):
        if freed_bytes - model.size_bytes >= short_bytes:
            chosen.remove(model)
            freed_bytes -= model.size_bytes
    return tuple(model.model_id for model in chosen)
