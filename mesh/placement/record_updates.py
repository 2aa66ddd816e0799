"""What this pod writes into the models' records: that it loads one, that it failed to, that it no longer has it.

ModelMesh's conventions: a pod is in at most one of `instanceIds` (since when the load began) and `failedIn`.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from mesh.errors import NotFound
from mesh.registry.models import Models
from mesh.registry.records import Failure, ModelRecord
from mesh.types import ModelInfo

V = TypeVar("V")


class RecordUpdates:
    """All calls raise StoreError; a model that is no longer registered is left alone (`loading` raises NotFound)."""

    def __init__(self, models: Models, own_id: str) -> None:
        self._models = models
        self._own_id = own_id

    async def loading(self, model_id: str, info: ModelInfo, *, started_ms: int, last_used_ms: int) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or record.info != info:
                return record
            return msgspec.structs.replace(
                record,
                instance_ids={**record.instance_ids, self._own_id: started_ms},
                failed_in=_without(record.failed_in, self._own_id),
                failures=_without(record.failures, self._own_id),
                last_used_ms=max(record.last_used_ms, last_used_ms),
            )

        record = await self._models.table.update(model_id, change)
        if record is None or record.info != info:
            raise NotFound("model not found")

    async def measured(self, model_id: str, weight_bytes: int) -> None:
        """What its weights take, which is worth knowing also when it isn't loaded."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            return record and msgspec.structs.replace(record, weight_bytes=weight_bytes)

        await self._models.table.update(model_id, change)

    async def failed(self, model_id: str, message: str, *, at_ms: int) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None:
                return None
            return msgspec.structs.replace(
                record,
                instance_ids=_without(record.instance_ids, self._own_id),
                failed_in={**record.failed_in, self._own_id: at_ms},
                failures={**record.failures, self._own_id: Failure(message)},
            )

        await self._models.table.update(model_id, change)

    async def gone(self, model_id: str, *, last_used_ms: int = 0) -> None:
        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None:
                return None
            # also of a record that somebody else has taken this pod out of already: when it was last used only this pod knows
            return msgspec.structs.replace(
                record,
                instance_ids=_without(record.instance_ids, self._own_id),
                last_used_ms=max(record.last_used_ms, last_used_ms),
            )

        await self._models.table.update(model_id, change)

    async def clear_failures(self, model_id: str) -> None:
        """Forget all recorded failures: somebody asks for the model by name."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or not (record.failed_in or record.failures):
                return record
            return msgspec.structs.replace(record, failed_in={}, failures={})

        await self._models.table.update(model_id, change)

    async def clear_own_failure(self, model_id: str) -> None:
        """Forget this pod's failure: it is too old to mean anything."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or self._own_id not in record.failed_in:
                return record
            return msgspec.structs.replace(
                record,
                failed_in=_without(record.failed_in, self._own_id),
                failures=_without(record.failures, self._own_id),
            )

        await self._models.table.update(model_id, change)

    async def clear_instances(self, model_id: str) -> None:
        """No pod shall have it: each pod sees that it is no longer in the record, and unloads."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or not record.instance_ids:
                return record
            return msgspec.structs.replace(record, instance_ids={})

        await self._models.table.update(model_id, change)


def _without(values: Mapping[str, V], key: str) -> dict[str, V]:
    return {name: value for name, value in values.items() if name != key}
