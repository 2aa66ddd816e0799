"""Provides the registered models: ModelMesh's `registry` table and the rules of registering and unregistering."""

import math

import msgspec

from mesh.errors import AlreadyExists, InvalidRequest, PreconditionFailed
from mesh.registry.copy_settings import copy_settings_of, identity_of, is_same_model
from mesh.registry.records import ModelRecord
from mesh.registry.registration import check_id, name_in
from mesh.registry.secrets import refuse_secrets
from mesh.registry.table import Table
from mesh.store.protocol import Store
from mesh.types import ModelInfo

HOUR_MS = 3_600_000
LAST_USED_IF_LOADED_NOW_MS = HOUR_MS
LAST_USED_IF_NOT_MS = 6 * HOUR_MS


class Models:
    """`table` is public because placement writes its part of the records through it."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.table = Table(store, prefix, ModelRecord, keep_lost_s=math.inf)
        self._placed: set[str] = set()
        self.table.listen(self._record_changed)

    def get(self, model_id: str) -> ModelRecord | None:
        return self.table.get(model_id)

    async def find(self, model_id: str) -> ModelRecord | None:
        return await self.table.find(model_id)

    def placed(self) -> list[tuple[str, ModelRecord]]:
        """Return the models whose records name a pod, with their ids, sorted by id. Of 100,000 models they are few."""
        return [(model_id, record) for model_id in sorted(self._placed) if (record := self.table.get(model_id))]

    async def register(self, model_id: str, info: ModelInfo, *, last_used_ms: int, touch: bool = True) -> ModelRecord:
        """Register a model; idempotent. Only its copy settings may differ from those of an earlier registration.

        Raises AlreadyExists if it is registered with other attributes, InvalidRequest if it cannot be registered.
        """
        check_registrable(model_id, info)

        def change(old: ModelRecord | None) -> ModelRecord:
            if old is None:
                return new_model(info, last_used_ms=last_used_ms)
            if not is_same_model(old.info, info):
                raise AlreadyExists("Model already exists with different attribute values")
            old = with_copy_settings(old, info)
            # Every pod receives each write, so a small difference is not written.
            if touch and last_used_ms > old.last_used_ms + HOUR_MS:
                return msgspec.structs.replace(old, last_used_ms=last_used_ms)
            return old

        record = await self.table.update(model_id, change)
        assert record is not None
        return record

    async def unregister(self, model_id: str) -> None:
        """Remove a registration; idempotent. Raises PreconditionFailed while a vmodel points at the model."""

        def change(old: ModelRecord | None) -> None:
            if old is not None and old.refs > 0:
                raise PreconditionFailed(f"Model {model_id} has referents")

        # Read the store first: the cache may not have the record yet.
        await self.table.read(model_id)
        await self.table.update(model_id, change)

    async def touch(self, model_id: str, last_used_ms: int) -> None:
        """Record a later time of last use. An earlier time and an unknown model change nothing."""

        def change(old: ModelRecord | None) -> ModelRecord | None:
            if old is None or old.last_used_ms >= last_used_ms:
                return old
            return msgspec.structs.replace(old, last_used_ms=last_used_ms)

        await self.table.update(model_id, change)

    def _record_changed(self, model_id: str, _: ModelRecord | None, new: ModelRecord | None) -> None:
        if new is not None and (new.instance_ids or new.failed_in or new.failures):
            self._placed.add(model_id)
        else:
            self._placed.discard(model_id)


def new_model(info: ModelInfo, *, last_used_ms: int, auto_delete: bool = False) -> ModelRecord:
    """Return the record of a model that was not used yet. `last_used_ms` is its place in the order of last use."""
    record = ModelRecord(
        type=info.type,
        key=identity_of(info).key,
        path=info.path,
        auto_delete=auto_delete,
        last_used_ms=last_used_ms,
        entered_ms=last_used_ms,
    )
    return with_copy_settings(record, info)


def with_copy_settings(record: ModelRecord, info: ModelInfo) -> ModelRecord:
    """Return the record with the copy settings of another registration of the same model, or the record itself if they are equal."""
    settings = copy_settings_of(info)
    return record if settings == record.copy_settings else msgspec.structs.replace(record, changeable=settings)


def check_registrable(model_id: str, info: ModelInfo) -> None:
    if not model_id:
        raise InvalidRequest("must provide non-empty modelId")
    check_id(model_id)
    if not info.type:
        raise InvalidRequest("Must provide non-empty model type string")
    refuse_secrets(name_in(model_id), info)


def entry_time_ms(asked_ms: int, now_ms: int, *, load_now: bool) -> int:
    """Return the time of last use with which a model is registered: an unused model must not displace one in use."""
    if asked_ms <= 0:
        return now_ms - (LAST_USED_IF_LOADED_NOW_MS if load_now else LAST_USED_IF_NOT_MS)
    return min(asked_ms, now_ms)
