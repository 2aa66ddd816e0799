"""Writes this pod's part of the models' records: that it loads a model, failed to load it, or no longer has it.

As in ModelMesh, a pod is in at most one of `instanceIds` (with the time at which its load began) and `failedIn`.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Set
from typing import TypeVar

import msgspec

from mesh.errors import MeshError, NotFound, StoreError
from mesh.placement.learned_copies import LearnedCopies
from mesh.registry.models import Models
from mesh.registry.records import Failure, ModelRecord
from mesh.types import ModelInfo

logger = logging.getLogger(__name__)

V = TypeVar("V")

_MAX_FILES_IN = 4


class LoadedElsewhere(MeshError):
    """Another pod has the model or loads it."""


class RecordUpdates:
    """Every method raises StoreError. An unregistered model is ignored, except by `loading`, which raises NotFound."""

    def __init__(self, models: Models, own_id: str, learned: LearnedCopies) -> None:
        """`learned` keeps the failures that cannot be recorded, so that a failing model is not loaded over and over."""
        self._models = models
        self._own_id = own_id
        self._learned = learned

    async def _update(
        self, model_id: str, change: Callable[[ModelRecord | None], ModelRecord | None]
    ) -> ModelRecord | None:
        if self._learned.is_store_away():  # no update waits for its time limit
            raise StoreError("store: records cannot be changed now; the next sweep repeats the update")
        return await self._models.table.update(model_id, change)

    async def loading(
        self,
        model_id: str,
        info: ModelInfo,
        *,
        started_ms: int,
        last_used_ms: int,
        alone_among: Set[str] = frozenset(),
    ) -> None:
        """Add this pod to the record. Raises NotFound if the model is not registered with this `info`.

        Raises LoadedElsewhere and changes nothing if a pod of `alone_among` has the model or loads it: of several pods that start a load at the
        same time, one continues.
        """

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or record.info != info:
                return record
            if elsewhere := record.instance_ids.keys() & alone_among:
                raise LoadedElsewhere(f"pod {min(elsewhere)} has it or loads it", model=model_id)
            others = tuple(pod_id for pod_id in record.files_in if pod_id != self._own_id)
            return msgspec.structs.replace(
                record,
                instance_ids={**record.instance_ids, self._own_id: started_ms},
                files_in=(self._own_id, *others)[:_MAX_FILES_IN],
                failed_in=_without(record.failed_in, self._own_id),
                failures=_without(record.failures, self._own_id),
                last_used_ms=max(record.last_used_ms, last_used_ms),
            )

        record = await self._update(model_id, change)
        if record is None or record.info != info:
            raise NotFound("model not found")

    async def loaded(self, model_id: str) -> None:
        """End the count of failures in a row, because a load succeeded."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            return record and msgspec.structs.replace(record, num_failures=0)

        await self._update(model_id, change)

    async def measured(self, model_id: str, weight_bytes: int) -> None:
        """Record the size of the weights, which is shown while the model is not loaded, too."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            return record and msgspec.structs.replace(record, weight_bytes=weight_bytes)

        await self._update(model_id, change)

    async def failed(self, model_id: str, message: str, *, at_ms: int, lasting: bool = False) -> None:
        """Move this pod from the pods that have the model to those that failed to load it."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None:
                return None
            return msgspec.structs.replace(
                record,
                instance_ids=_without(record.instance_ids, self._own_id),
                failed_in={**record.failed_in, self._own_id: at_ms},
                failures={**record.failures, self._own_id: Failure(message, lasting)},
                num_failures=record.num_failures + 1,
            )

        self._learned.failed(model_id, self._own_id, Failure(message, lasting))
        await self._update(model_id, change)

    async def gone(self, model_id: str, *, last_used_ms: int = 0, use: float | None = None) -> None:
        """Remove this pod from the record.

        The time of the last use is written even if another pod has removed this one already: only this pod knows it. `use`: how much the model was
        used, for the pod that loads it next; None if it is not known.
        """

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None:
                return None
            return msgspec.structs.replace(
                record,
                instance_ids=_without(record.instance_ids, self._own_id),
                last_used_ms=max(record.last_used_ms, last_used_ms),
                use=record.use if use is None else round(use, 2),
            )

        self._learned.left(model_id, self._own_id)
        await self._update(model_id, change)

    async def clear_failures(self, model_id: str) -> None:
        """Forget all pods' failures, because a caller asked for the model by name."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or not (record.failed_in or record.failures or record.num_failures):
                return record
            return msgspec.structs.replace(record, failed_in={}, failures={}, num_failures=0)

        await self._update(model_id, change)

    async def clear_own_failure(self, model_id: str) -> None:
        """Forget this pod's failure, which is too old to matter or precedes its restart."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or self._own_id not in record.failed_in:
                return record
            failed_in = _without(record.failed_in, self._own_id)
            return msgspec.structs.replace(
                record,
                failed_in=failed_in,
                failures=_without(record.failures, self._own_id),
                num_failures=record.num_failures if failed_in else 0,
            )

        await self._update(model_id, change)

    async def clear_instances(self, model_id: str) -> None:
        """Remove all pods from the record. Each pod sees its removal and unloads its copy."""

        def change(record: ModelRecord | None) -> ModelRecord | None:
            if record is None or not record.instance_ids:
                return record
            return msgspec.structs.replace(record, instance_ids={})

        await self._update(model_id, change)


async def log_errors(update: Awaitable[None]) -> None:
    """Await an update and log its failure: the store is unreachable, or the model is not registered. The next sweep repeats it."""
    try:
        await update
    except (StoreError, NotFound) as error:
        logger.debug("record not updated: %s", error.message)
    except MeshError as error:
        logger.warning("record not updated: %s", error.message)


def _without(values: Mapping[str, V], key: str) -> dict[str, V]:
    return {name: value for name, value in values.items() if name != key}
