"""Looks at a model without loading it: finds its configuration and its files' index, here or at its source, and says what it would need.

Knows where to look; the arithmetic is runtime.fit's.
"""

from dataclasses import dataclass
from typing import Protocol

from runtime.fit import Geometry, Needs
from runtime.types import ModelSettings, ModelSource, Quantization


@dataclass(frozen=True, slots=True)
class Look:
    """What was found. `exact`: from the files' own index, not estimated."""

    geometry: Geometry
    needs: Needs
    quantization: Quantization
    exact: bool


class Fitter(Protocol):
    async def look(self, source: ModelSource, settings: ModelSettings, device: str, *, local_only: bool = False) -> Look:
        """`local_only`: raise LoadFailed at once where it would need the network. Raises InvalidRequest, LoadFailed."""
