"""States of an engine process, and the events of its life that the manager of the models handles."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from runtime.errors import RepertoryError


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class EngineDeath:
    """The state at a crash. `stepping`: the model that was running or about to run. `loading`: the models whose loads had not ended.

    `models`: all models of the engine, those whose loads had not ended included.
    """

    exit_text: str
    stepping: str | None
    loading: tuple[str, ...]
    models: frozenset[str]


class EngineListener(Protocol):
    def engine_ready(self, models: Collection[str]) -> None:
        """Handle an engine that is ready for loads. `models`: those that its predecessor had."""

    def engine_died(self, death: EngineDeath) -> None: ...

    def engine_dropped(self, model_id: str, error: RepertoryError) -> None:
        """Handle a loaded model that failed by itself and is no longer in the engine."""
