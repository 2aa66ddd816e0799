"""Defines the bounds of one plan. The engine's core sets them from what all models hold."""

from dataclasses import dataclass

from runtime.engine.scheduler.kv_return import KvReturn


@dataclass(frozen=True, slots=True)
class KvRoom:
    """KV blocks that a model could have, including those that it holds, without preempting a row of another model.

    Attributes:
        planned: leaves to the other models what their running sequences are expected to need later.
        now: leaves to them only what they hold, and what is kept for a sequence that waits for it.
    """

    planned: int
    now: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds one plan. `kv_return`: what decides about KV in host memory; None = it is copied back."""

    token_budget: int
    room: KvRoom
    admit_rows: int
    kv_return: KvReturn | None = None
