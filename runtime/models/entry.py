"""One model that the manager loads, holds or has failed to load."""

import time
from dataclasses import dataclass, field

from common.model_key import ModelSettings
from runtime.interfaces import ServedModel
from runtime.models.model_state import ModelView, Phase, Prepared, Progress
from runtime.types import ModelSource


@dataclass(eq=False, slots=True)
class Entry:
    """`mark` is the fingerprint of source and settings. `served` is set while the model is loaded, or returns after a crash."""

    model_id: str
    source: ModelSource
    settings: ModelSettings
    mark: bytes
    phase: Phase = Phase.PULLING
    progress: Progress | None = None
    prepared: Prepared | None = None
    served: ServedModel | None = None
    load_seconds: float = 0.0
    last_used_s: float = field(default_factory=time.monotonic)
    error: str = ""
    base_id: str = ""  # of the model whose adapter it is; "" until that is known, and for other models

    @property
    def name(self) -> str:
        return self.settings.display_name or self.model_id

    def view(self) -> ModelView:
        return ModelView(
            self.model_id,
            self.phase,
            self.settings,
            self.progress,
            self.served.facts if self.served else None,
            self.load_seconds,
            self.last_used_s,
            self.error,
        )

    def release(self) -> None:
        """Give the prepared files back to the disk cache."""
        if self.prepared is not None:
            self.prepared.release()
            self.prepared = None
