"""Provides the registry of one mesh: its three tables, and registered names on top of them."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice

from mesh.access.caller import EVERY_MODEL, current_caller
from mesh.errors import AlreadyExists, InvalidRequest, NotFound
from mesh.registry.copy_settings import is_same_model
from mesh.registry.instances import Instances
from mesh.registry.models import Models, entry_time_ms
from mesh.registry.records import ModelRecord, VModelRecord
from mesh.registry.registration import base_of, belongs_to, check_id, check_name, concrete_id
from mesh.registry.vmodel_plan import VModelRequest
from mesh.registry.vmodels import VModels
from mesh.store.protocol import Store
from mesh.types import ModelInfo

NAMES_IN_A_MESSAGE = 10
_ALL_COMPARED = 1000
_BESIDE = 100


@dataclass(frozen=True, slots=True)
class NamedModel:
    """The model behind a name now. `target_id` differs from `model_id` while the name moves. `move_failed`: the target could not be loaded."""

    name: str
    model_id: str
    target_id: str
    record: ModelRecord
    aliases: tuple[str, ...] = ()
    move_failed: bool = False


class Registry:
    """Names and the models behind them, as all pods see them. The caller opens and closes the store.

    Names that a request gives are checked against the models of its key: what resolves, registers or removes a name raises PermissionDenied.
    """

    def __init__(
        self,
        store: Store,
        *,
        root_prefix: str,
        kv_prefix: str,
        service_name: str,
        instance_id: str,
        session_ttl_s: float,
        default_owner: str,
    ) -> None:
        root = f"{root_prefix}/{kv_prefix}/{service_name}"
        self.models = Models(store, f"{root}/registry/")
        self.vmodels = VModels(store, f"{root}/vmodels/", self.models, default_owner=default_owner)
        self.instances = Instances(
            store,
            f"{root}/instances/",
            f"{root}/instanceChanges/",
            own_id=instance_id,
            ttl_s=session_ttl_s,
            latch_prefix=f"{root}/leaderLatch/",
        )
        self.config_prefix = f"{root}/config/"
        self._named: tuple[NamedModel, ...] | None = None
        self._names: tuple[str, ...] | None = None
        self._pointing: dict[str, tuple[str, ...]] = {}  # the vmodels, sorted, whose active or target model an id is
        self.models.table.listen(self._model_changed)
        self.vmodels.table.listen(self._vmodel_changed)

    async def start(self, timeout_s: float = 20.0) -> None:
        """Fill all tables. Raises StoreError."""
        try:
            for part in (self.models.table, self.vmodels.table, self.instances):
                await part.start(timeout_s)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Withdraw this pod's record and stop watching."""
        for part in (self.instances, self.models.table, self.vmodels.table):
            await part.close()

    @property
    def num_lost(self) -> int:
        """The number of records that disappeared from the store in a mass and are kept until they return or `accept_loss` is called."""
        return self.models.table.num_lost + self.vmodels.table.num_lost

    def accept_loss(self) -> None:
        """Drop the records that disappeared, as an operator has confirmed that they were deleted on purpose."""
        for table in (self.models.table, self.vmodels.table):
            table.accept_loss()

    def resolve(self, name: str) -> str:
        """Return the concrete model id behind a name; a vmodel wins over a model. Raises NotFound."""
        vmodel = self.vmodels.get(name)
        if vmodel is not None and (vmodel.active_id in self.models.table or vmodel.target_id not in self.models.table):
            return vmodel.active_id
        if vmodel is not None:
            # The cache lags: the active model is deleted already, and the target has replaced it.
            return vmodel.target_id
        if name in self.models.table:
            return name
        raise self._unknown(name)

    async def resolve_known(self, name: str, *, virtual: bool) -> str:
        """Resolve a name, or a vmodel alone if `virtual`. Asks the store for a name that may just have been registered elsewhere.

        Raises InvalidRequest for a name that breaks the naming rule, PermissionDenied, NotFound.
        """
        check_id(name)
        current_caller().check_model(name)
        try:
            return self.resolve_vmodel(name) if virtual else self.resolve(name)
        except NotFound:
            if virtual and await self.vmodels.find(name) is None:
                raise
            return await self.resolve_fresh(name)

    async def resolve_fresh(self, name: str) -> str:
        """Resolve a name in the store, if it answers: another pod may have just registered or moved it.

        Raises InvalidRequest, PermissionDenied, NotFound.
        """
        check_id(name)
        current_caller().check_model(name)
        vmodel = await self.vmodels.table.refresh(name)
        if vmodel is not None:
            await self.models.find(vmodel.active_id)
            return self.resolve(name)
        if await self.models.find(name) is not None:
            return name
        raise self._unknown(name)

    async def lost_base(self, info: ModelInfo) -> str:
        """Return the name of an adapter's base if it is not registered, else ""."""
        try:
            await self.base_of(info)
        except NotFound:
            return base_of(info)
        return ""

    async def base_of(self, info: ModelInfo) -> tuple[str, ModelInfo] | None:
        """Return the model whose LoRA adapter this is, or None if it is none. Raises NotFound for a base that is not registered."""
        name = base_of(info)
        if not name:
            return None
        try:
            base_id = self.resolve(name)
        except NotFound:
            # Another pod may have registered it a moment ago.
            await self.vmodels.find(name)
            await self.models.find(name)
            base_id = self.resolve(name)
        record = await self.models.find(base_id)
        if record is None:
            raise self._unknown(name)
        return base_id, record.info

    async def successor(self, name: str, gone_id: str) -> str | None:
        """Return the model that replaced `gone_id`, to which the name was resolved; None if there is no other model. Raises StoreError."""
        try:
            model_id = self.resolve(name)
            if model_id == gone_id:
                model_id = await self.resolve_fresh(name)
        except NotFound:
            return None
        return model_id if model_id != gone_id else None

    def resolve_vmodel(self, vmodel_id: str) -> str:
        """Like resolve, for vmodels only. Raises NotFound with ModelMesh's text."""
        if self.vmodels.get(vmodel_id) is None:
            raise NotFound("vmodel not found")
        return self.resolve(vmodel_id)

    def names(self) -> list[str]:
        """Return the names that clients may use, sorted: vmodels, and models that were not registered through a vmodel only.

        They are cached until a name appears or disappears, because the refusal of an unknown name quotes them.
        """
        if self._names is None:
            plain = (model_id for model_id in self.models.table if not self._is_hidden(model_id))
            virtual = (name for name in self.vmodels.table if self.resolve(name) in self.models.table)
            self._names = tuple(sorted({*virtual, *plain}))
        return list(self._names)

    def named(self) -> tuple[NamedModel, ...]:
        """Return all names, sorted. The list is cached until a change, because each event of `/models/sse` needs it."""
        if self._named is None:
            self._named = self._list_named()
        return self._named

    def find_named(self, name: str) -> NamedModel | None:
        """Return one entry of `named` without building the list."""
        vmodel = self.vmodels.get(name)
        if vmodel is None:
            record = self.models.get(name)
            return NamedModel(name, name, name, record, tuple(self.pointing_at(name))) if record is not None else None
        model_id = self.resolve(name)
        record = self.models.get(model_id)
        if record is None:
            return None
        aliases = tuple(other for other in self.pointing_at(model_id) if other != name)
        return NamedModel(name, model_id, vmodel.target_id, record, aliases, vmodel.failed)

    def pointing_at(self, model_id: str) -> list[str]:
        """Return the vmodels whose active or target model this is, sorted."""
        return list(self._pointing.get(model_id, ()))

    def _vmodel_changed(self, name: str, old: VModelRecord | None, new: VModelRecord | None) -> None:
        for model_id in {old.active_id, old.target_id} if old is not None else ():
            names = tuple(other for other in self._pointing.pop(model_id, ()) if other != name)
            if names:
                self._pointing[model_id] = names
        for model_id in {new.active_id, new.target_id} if new is not None else ():
            self._pointing[model_id] = tuple(sorted({*self._pointing.get(model_id, ()), name}))
        self._named = self._names = None

    def _model_changed(self, _: str, old: ModelRecord | None, new: ModelRecord | None) -> None:
        self._named = None
        if old is None or new is None or old.auto_delete != new.auto_delete:
            self._names = None

    def _is_hidden(self, model_id: str) -> bool:
        """Return whether the model was registered through a vmodel only."""
        record = self.models.get(model_id)
        return record is None or (record.auto_delete and model_id in self._pointing)

    def _list_named(self) -> tuple[NamedModel, ...]:
        found = []
        for name, vmodel in self.vmodels.table.items():
            model_id = self.resolve(name)
            if (record := self.models.get(model_id)) is not None:
                aliases = tuple(other for other in self.pointing_at(model_id) if other != name)
                found.append(NamedModel(name, model_id, vmodel.target_id, record, aliases, vmodel.failed))
        for model_id, record in self.models.table.items():
            if not self._is_hidden(model_id) and self.vmodels.get(model_id) is None:
                found.append(NamedModel(model_id, model_id, model_id, record, tuple(self.pointing_at(model_id))))
        return tuple(sorted(found, key=lambda named: named.name))

    def name_of(self, model_id: str) -> str:
        """Return the name that a concrete model was registered under; its own id if there is none."""
        return next((name for name in self.pointing_at(model_id) if belongs_to(model_id, name)), model_id)

    async def register_name(self, name: str, info: ModelInfo, *, now_ms: int, is_loaded: Callable[[str], bool]) -> str:
        """Register files and settings under `name`, and return the concrete id.

        Equal files and settings change nothing, and other copy settings only those. For other files or settings the name moves to a new model; the
        old model answers until the new one is loaded.
        Raises AlreadyExists if the name is itself a model id, InvalidRequest, StoreError.
        """
        check_name(name)
        current_caller().check_model(name)
        plain = await self.models.find(name)
        if plain is not None and is_same_model(plain.info, info):
            await self.models.register(name, info, last_used_ms=0)
            return name
        if plain is not None:
            raise AlreadyExists(f"{name} is already registered as a model id with other attributes; remove it first")
        target_id = concrete_id(name, info)
        fresh = entry_time_ms(0, now_ms, load_now=False)
        await self.vmodels.set(
            VModelRequest(name, target_id, info, auto_delete=True), now_ms=fresh, is_loaded=is_loaded
        )
        return target_id

    async def set_alias(self, alias: str, target: str, *, now_ms: int, is_loaded: Callable[[str], bool]) -> str:
        """Point another name at the model behind `target`, and return its concrete id. Raises NotFound, AlreadyExists, InvalidRequest."""
        check_name(alias)
        current_caller().check_model(alias)
        if alias == target:
            raise InvalidRequest(f"alias {alias}: the target must be another name")
        if await self.models.find(alias) is not None:
            raise AlreadyExists(f"{alias} is a registered model; an alias must have a name of its own")
        own = self.vmodels.get(alias)
        if own is not None and belongs_to(own.target_id, alias):
            raise AlreadyExists(f"{alias} is a registered model; an alias must have a name of its own")
        model_id = await self.resolve_fresh(target)
        await self.vmodels.set(VModelRequest(alias, model_id), now_ms=now_ms, is_loaded=is_loaded)
        return model_id

    async def remove_alias(self, alias: str) -> None:
        """Remove an alias; its model stays. Raises NotFound, also for a name that is registered itself; StoreError."""
        current_caller().check_model(alias)
        own = await self.vmodels.find(alias)
        if own is None or belongs_to(own.target_id, alias):
            what = (
                "it is a registered model" if own is not None or alias in self.models.table else "there is no such name"
            )
            raise NotFound(f"alias {alias!r} not found: {what}")
        await self.vmodels.delete(alias)

    async def remove_name(self, name: str) -> None:
        """Remove a name, and its model unless another name points at it. Raises NotFound, PreconditionFailed, StoreError."""
        current_caller().check_model(name)
        if await self.vmodels.find(name) is not None:
            await self.vmodels.delete(name)
        elif await self.models.find(name) is not None:
            await self.models.unregister(name)
        else:
            raise self._unknown(name)

    def _unknown(self, name: str) -> NotFound:
        caller, known = current_caller(), self.names()
        near = neighbours(name, known)
        names = [other for other in near if caller.may_use(other)]
        if not names and len(near) < len(known):
            names = list(islice((other for other in known if caller.may_use(other)), NAMES_IN_A_MESSAGE + 1))
        shown = nearest_first(name, names)[:NAMES_IN_A_MESSAGE]
        num_left = len(known if caller.models == EVERY_MODEL else names) - len(shown)
        is_counted = caller.models == EVERY_MODEL or len(near) == len(known)
        more = (f" and {num_left} more" if is_counted else " and others") if num_left else ""
        return NotFound(
            f"model not found: {name!r}; "
            + (f"served here: {', '.join(shown)}{more}" if shown else "no model is registered")
        )


def neighbours(name: str, names: Sequence[str]) -> Sequence[str]:
    """Return the names that are compared with `name`: all, or of many sorted names those that stand beside it."""
    if len(names) <= _ALL_COMPARED:
        return names
    at = bisect_left(names, name)
    return names[max(0, at - _BESIDE) : at + _BESIDE]


def nearest_first(name: str, names: Sequence[str]) -> list[str]:
    """Return the names with those that are spelled like `name` first. Comparing one takes some 20 µs."""
    by_folded = {other.lower(): other for other in names}
    near = [by_folded[match] for match in get_close_matches(name.lower(), by_folded, n=NAMES_IN_A_MESSAGE)]
    return [*near, *(other for other in names if other not in near)]
