"""Phases of a model in the runtime, its view for the APIs, and the Protocol of the preparer of its files."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from common.model_key import ModelSettings
from runtime.types import Checkpoint, ModelFacts, ModelSource


class Phase(StrEnum):
    PULLING = "pulling"
    PACKING = "packing"
    LOADING = "loading"
    LOADED = "loaded"
    RETURNING = "returning"  # the engine crashed and the model is being reloaded
    UNLOADING = "unloading"
    FAILED = "failed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress within a phase. `total_bytes` is 0 if unknown."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    text: str = ""


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Files that are ready to load. The disk cache keeps them until `release` is called, once. `identity` is the source's at that time."""

    checkpoint: Checkpoint
    release: Callable[[], None]
    identity: str = ""


class Preparer(Protocol):
    """Pulls, checks and, for a quantised model, packs the files of a model."""

    async def prepare(self, source: ModelSource, settings: ModelSettings, device: str, report: Report) -> Prepared:
        """Prepare the files of a model. `report` may be called from any thread. Cancelling leaves no incomplete files.

        Raises InvalidRequest (path, key), LoadFailed (files), Overloaded (disk full).
        """

    async def identity(self, source: ModelSource) -> str:
        """Return text that changes with the files at the source: their sizes, times, ETags or commit. Raises InvalidRequest, LoadFailed."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """The state of one model."""

    model_id: str
    phase: Phase
    settings: ModelSettings
    progress: Progress | None = None
    facts: ModelFacts | None = None
    load_seconds: float = 0.0
    last_used_s: float = 0.0  # monotonic
    error: str = ""
