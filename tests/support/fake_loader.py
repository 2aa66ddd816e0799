"""Placement for tests: "loads" by writing what a pod would write into the registry, as fast or as slowly or as badly as a test wants."""

import asyncio
from collections.abc import Mapping

import msgspec

from mesh.errors import NotFound
from mesh.registry.records import Failure, ModelRecord
from mesh.registry.registry import Registry
from mesh.types import CopyInfo, ModelStatus, StatusInfo

INSTANCE_ID = "pod-a"


class FakeLoader:
    """`broken`: ids that cannot be loaded, with the cause. `held`: ids whose load waits until their event is set."""

    def __init__(self, registry: Registry) -> None:
        self.broken: dict[str, str] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.asked: list[tuple[str, int, bool]] = []
        self._registry = registry
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._clock_ms = 1000

    async def ensure_loaded(self, model_id: str, *, last_used_ms: int = 0, wait: bool = False) -> StatusInfo:
        self.asked.append((model_id, last_used_ms, wait))
        if await self._registry.models.find(model_id) is None:  # another pod may just have written it
            raise NotFound("model not found")
        if self.status(model_id).status is not ModelStatus.LOADED and model_id not in self._loads:
            # ModelMesh announces a load before it begins
            await self._place({INSTANCE_ID: self._now()}, model_id)
            self._loads[model_id] = asyncio.create_task(self._load(model_id))
        if wait and model_id in self._loads:
            await asyncio.shield(self._loads[model_id])
        return self.status(model_id)

    async def unload(self, model_id: str) -> None:
        await self._place({}, model_id)

    def status(self, model_id: str) -> StatusInfo:
        record = self._registry.models.get(model_id)
        if record is None:
            return StatusInfo(ModelStatus.NOT_FOUND)
        if record.failed_in:
            copies = tuple(CopyInfo(pod, ModelStatus.LOADING_FAILED, at) for pod, at in record.failed_in.items())
            return StatusInfo(
                ModelStatus.LOADING_FAILED, tuple(failure.message for failure in record.failures.values()), copies
            )
        if not record.instance_ids:
            return StatusInfo(ModelStatus.NOT_LOADED)
        status = ModelStatus.LOADING if model_id in self._loads else ModelStatus.LOADED
        return StatusInfo(status, (), tuple(CopyInfo(pod, status, at) for pod, at in record.instance_ids.items()))

    def is_loading(self, model_id: str) -> bool:
        return model_id in self._loads

    def blocked_for_s(self, model_id: str) -> float:
        record = self._registry.models.get(model_id)
        return 60.0 if record is not None and record.failed_in else 0.0

    async def close(self) -> None:
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)

    async def _load(self, model_id: str) -> None:
        try:
            if model_id in self.held:
                await self.held[model_id].wait()
            if model_id in self.broken:
                await self._fail(model_id, self.broken[model_id])
        finally:
            del self._loads[model_id]

    async def _place(self, instance_ids: Mapping[str, int], model_id: str) -> None:
        def change(old: ModelRecord | None) -> ModelRecord | None:
            return old and msgspec.structs.replace(old, instance_ids=instance_ids, failed_in={}, failures={})

        await self._registry.models.table.update(model_id, change)

    async def _fail(self, model_id: str, cause: str) -> None:
        at_ms = self._now()

        def change(old: ModelRecord | None) -> ModelRecord | None:
            return old and msgspec.structs.replace(
                old, instance_ids={}, failed_in={INSTANCE_ID: at_ms}, failures={INSTANCE_ID: Failure(message=cause)}
            )

        await self._registry.models.table.update(model_id, change)

    async def expire_failure(self, model_id: str) -> None:
        """A failure record has expired."""
        await self._place({}, model_id)

    def _now(self) -> int:
        self._clock_ms += 1
        return self._clock_ms
