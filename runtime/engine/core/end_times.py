"""Estimates when running sequences end, from the cost of a step and the length of earlier outputs. Models take turns, one step each."""

from collections.abc import Iterable

from runtime.engine.core.loaded_model import LoadedModel


def round_s(models: Iterable[LoadedModel]) -> float:
    """Return the expected duration of one step of each model that runs."""
    return sum(m.cost.predict_us(*m.scheduler.decoding()) for m in models if m.scheduler.running) * 1e-6


def first_end_s(models: Iterable[LoadedModel], of: LoadedModel | None = None) -> float | None:
    """Return the expected time until the first running sequence ends, of one model or of all. None if nothing runs."""
    busy = [model for model in models if model.scheduler.running]
    steps = [model.scheduler.steps_left()[0] for model in busy if of is None or model is of]
    return min(steps) * round_s(busy) if steps else None


def busy_s(models: Iterable[LoadedModel]) -> dict[str, float]:
    """Return the expected time until the last running sequence of each model ends; 0 for a model that runs nothing."""
    listed = [*models]
    step_s = round_s(listed)
    return {model.model_id: model.scheduler.steps_left()[1] * step_s for model in listed}
