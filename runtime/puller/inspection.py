"""Looks at a model without loading it: finds its configuration and its files' index, here or at its source, and says what it would need.

Knows where to look; the arithmetic is runtime.fit's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.model_key import ModelSettings, Quantization
from runtime.puller.sizing import Geometry, Needs
from runtime.types import ModelSource


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What was found. `exact`: from the files' own index, not estimated. `config`: config.json, or of `gguf_file` what it says of itself."""

    geometry: Geometry
    needs: Needs
    quantization: Quantization
    exact: bool
    config: Mapping[str, object]
    gguf_file: Path | None = None


class ModelInspector(Protocol):
    async def look(
        self, source: ModelSource, settings: ModelSettings, device: str, *, local_only: bool = False
    ) -> ModelMetadata:
        """`local_only`: raise LoadFailed at once where it would need the network. Raises InvalidRequest, LoadFailed."""

    async def refusal(self, look: ModelMetadata, settings: ModelSettings) -> str:
        """Why the engine can't run what was found, whatever its size; empty if it can. Takes seconds, the first time."""
