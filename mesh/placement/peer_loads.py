"""Defines how a pod has another pod load or unload a model."""

from typing import Protocol

from mesh.registry.records import InstanceRecord


class PeerLoads(Protocol):
    async def load(
        self, pod: InstanceRecord, model_id: str, *, last_used_ms: int, urgent: bool, is_extra: bool
    ) -> None:
        """Have another pod load a model, and return when the load has begun. Raises MeshError if the pod is unreachable or refuses."""

    async def unload_now(self, pod: InstanceRecord, model_id: str) -> None:
        """Have another pod end a model's requests and unload it. Raises MeshError if the pod is unreachable or refuses."""
