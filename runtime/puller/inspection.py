"""The interface for inspecting a model without loading it: its configuration, the tensors in its files, and what it would need."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from common.model_key import ModelSettings, Quantization
from runtime.puller.sizing import Geometry, Needs, Unpacking
from runtime.types import ModelSource


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What is known of a model. `exact` if the needs come from the files' index. `config` is config.json, or a GGUF file's own metadata.

    `gguf_file`: the GGUF file, if it is on this machine. `unpacking`: the memory that its blocks take once they are loaded. `is_remote_gguf`: the
    GGUF file has not been pulled yet, so only its index was read. `shared_needs`: the needs on each device of a group, by the group's size.
    """

    geometry: Geometry
    needs: Needs
    quantization: Quantization
    exact: bool
    config: Mapping[str, object]
    gguf_file: Path | None = None
    unpacking: Unpacking | None = None
    is_remote_gguf: bool = False
    shared_needs: Mapping[int, Needs] = field(default_factory=dict)

    def needs_on(self, num_devices: int) -> Needs:
        """Return the needs on each of `num_devices` that share the model."""
        return self.shared_needs.get(num_devices, self.needs)


class ModelInspector(Protocol):
    async def look(
        self,
        source: ModelSource,
        settings: ModelSettings,
        device: str,
        *,
        group_sizes: Collection[int] = (),
        local_only: bool = False,
    ) -> ModelMetadata:
        """Inspect a model, for one device and for groups of these sizes. With `local_only`, raise LoadFailed at once if the network is needed. Raises InvalidRequest, LoadFailed."""

    async def refusal(self, look: ModelMetadata, settings: ModelSettings) -> str:
        """Return why the engine cannot run the model, whatever its size; empty if it can. The first call takes seconds."""
