"""The words of a model's life in the runtime, and the seam to whoever makes its files ready.

Plain data; knows no state machine (runtime.models) and no storage (runtime.puller.preparer).
"""

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
    RETURNING = "returning"  # the engine died; the model is on its way back
    UNLOADING = "unloading"
    FAILED = "failed"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase is. `total_bytes` 0 = not known."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    text: str = ""


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Files ready to load, held in the disk cache until `release` is called (once)."""

    checkpoint: Checkpoint
    release: Callable[[], None]


class Preparer(Protocol):
    """Pull, look at, and pack if need be."""

    async def prepare(self, source: ModelSource, settings: ModelSettings, device: str, report: Report) -> Prepared:
        """`report` may be called from any thread. Cancelling leaves no half-made files that look whole.

        Raises InvalidRequest (path, key), LoadFailed (files), Overloaded (disk full).
        """


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as a watcher sees it."""

    model_id: str
    phase: Phase
    settings: ModelSettings
    progress: Progress | None = None
    facts: ModelFacts | None = None
    load_seconds: float = 0.0
    last_used_s: float = 0.0  # monotonic
    error: str = ""
