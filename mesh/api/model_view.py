"""Describes registered models as clients see them: one name, its settings, and its state over all pods."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from common.model_state import CopyState, Tier
from common.public_uri import public_uri
from mesh.access.caller import current_caller
from mesh.client.admin import Copy, Model
from mesh.registry.copy_settings import DEFAULT
from mesh.registry.records import ModelRecord
from mesh.registry.registration import belongs_to, settings_of
from mesh.registry.registry import NamedModel, Registry
from mesh.types import CopyInfo, ModelStatus, ModelStatuses, StatusInfo

_BY_DISTANCE = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.REMOTE)
_MAX_CACHED_SETTINGS = 10_000
_LOADING_STATES = (CopyState.LOADING, CopyState.PACKING, CopyState.PULLING, CopyState.QUEUED)
_NO_COPY = CopyInfo("", ModelStatus.NOT_LOADED, 0)


@dataclass(frozen=True, slots=True)
class _Move:
    """A name's move to another model: the path of its files, its state, and whether it failed to load."""

    path: str
    status: StatusInfo
    has_failed: bool


@dataclass(frozen=True, slots=True)
class Origin:
    """The place of a model's files, without secrets, and the name of its base if it is a LoRA adapter."""

    root: str
    parent: str | None


class ModelViews:
    """`last_used_ms` returns when any pod last used a model, 0 if unknown."""

    def __init__(self, registry: Registry, states: ModelStatuses, last_used_ms: Callable[[str], int]) -> None:
        self._registry = registry
        self._states = states
        self._last_used_ms = last_used_ms
        self._settings: dict[str, dict[str, Any]] = {}  # of the keys, by key

    def all(self) -> list[Model]:
        """Describe all models that the caller may use."""
        return [self._view(named) for named in self._named()]

    def states(self) -> list[tuple[str, Model | None]]:
        """Like `all()`, keyed by name. None for models that are unloaded and healthy (the common case)."""
        named = self._named()
        return [(each.name, None if self._is_unloaded(each) else self._view(each)) for each in named]

    def origins(self) -> dict[str, Origin]:
        """Return where each model that the caller may use comes from, by name."""
        return {named.name: self._origin(named.record) for named in self._named()}

    def _origin(self, record: ModelRecord) -> Origin:
        return Origin(public_uri(record.path), self._settings_of(record).get("adapter_of"))

    def _named(self) -> list[NamedModel]:
        caller = current_caller()
        return [named for named in self._registry.named() if caller.may_use(named.name)]

    async def one(self, name: str) -> Model:
        """Describe a model by name or concrete id. Raises NotFound."""
        model_id = await self._registry.resolve_fresh(name)
        named = self._registry.find_named(name)
        if named is None:
            record = self._registry.models.get(model_id)
            assert record is not None
            named = NamedModel(name, model_id, model_id, record)
        return self._view(named)

    def _is_unloaded(self, named: NamedModel) -> bool:
        return named.target_id == named.model_id and not self._states.status(named.model_id).copies

    def _view(self, named: NamedModel) -> Model:
        status = self._states.status(named.model_id)
        best = _best(status)
        move = self._move_of(named)
        # While a name is moving, the new target's progress is of interest.
        loading = _best(move.status) if move and move.status.status is not ModelStatus.LOADED else best
        settings = self._settings_of(named.record)
        return Model(
            name=named.name,
            model_id=named.model_id,
            uri=named.record.path,
            type=named.record.type,
            settings=settings,
            status=status.status.name,
            state=_state(status, best),
            tier=best.model.tier if best.status is ModelStatus.LOADED else "",
            weight_bytes=best.model.weight_bytes or named.record.weight_bytes,
            device_bytes=sum(copy.model.device_bytes for copy in status.copies),
            quantization=best.model.quantization or str(settings.get("quantize") or ""),
            copies=[_copy(copy) for copy in status.copies],
            last_used_ms=self._used_ms(named),
            running=sum(copy.model.running for copy in status.copies),
            waiting=sum(copy.model.waiting for copy in status.copies),
            progress=loading.model.progress,
            progress_text=loading.model.progress_text,
            error=_error(status, move),
            moving_to=move.path if move else "",
            aliases=list(named.aliases),
            alias_of=self._alias_of(named),
        )

    def _move_of(self, named: NamedModel) -> _Move | None:
        if named.target_id == named.model_id:
            return None
        target = self._registry.models.get(named.target_id)
        path = target.path if target else ""
        return _Move(path, self._states.status(named.target_id), has_failed=bool(path) and named.move_failed)

    def _used_ms(self, named: NamedModel) -> int:
        """Return when the model was last used; 0 if it was not used since its registration."""
        last_used_ms = max(self._last_used_ms(named.model_id), named.record.last_used_ms)
        return last_used_ms if last_used_ms > named.record.entered_ms else 0

    def _settings_of(self, record: ModelRecord) -> dict[str, Any]:
        settings = self._settings.get(record.key)
        if settings is None:
            if len(self._settings) > _MAX_CACHED_SETTINGS:
                self._settings.clear()
            known = settings_of(record.info)
            settings = self._settings[record.key] = {
                key: known[key] for key in known if key not in ("display_name", "model_type")
            }
        if record.copy_settings == DEFAULT:
            return settings
        copies: dict[str, Any] = msgspec.to_builtins(record.copy_settings)
        return settings | copies

    def _alias_of(self, named: NamedModel) -> str:
        if (
            named.name == named.model_id
            or belongs_to(named.model_id, named.name)
            or belongs_to(named.target_id, named.name)
        ):
            return ""
        owner = self._registry.name_of(named.model_id)
        # A model that exists only through its vmodels, as those of KServe do, has no better name than theirs.
        return "" if owner == named.model_id and named.record.auto_delete else owner


def _best(status: StatusInfo) -> CopyInfo:
    """Return the loaded copy in the tier nearest to the device, else the copy that is loading furthest, else the newest one."""
    loaded = [copy for copy in status.copies if copy.status is ModelStatus.LOADED]
    if loaded:
        return min(
            loaded, key=lambda copy: _BY_DISTANCE.index(copy.model.tier) if copy.model.tier else len(_BY_DISTANCE)
        )
    loading = [copy for copy in status.copies if copy.model.state in _LOADING_STATES]
    if loading:
        return min(
            loading,
            key=lambda copy: _LOADING_STATES.index(copy.model.state) if copy.model.state in _LOADING_STATES else 0,
        )
    return status.copies[0] if status.copies else _NO_COPY


def _error(status: StatusInfo, move: _Move | None) -> str:
    """Return why the model, or the model that its name moves to, cannot be loaded; empty if nothing failed."""
    if move is not None and move.has_failed:
        cause = move.status.errors[0] if move.status.errors else "it failed to load"
        return f"{move.path} cannot take its place: {cause}"
    if status.status is ModelStatus.LOADED:
        return ""
    errors = status.errors or (move.status.errors if move else ())
    return errors[0] if errors else ""


def _state(status: StatusInfo, best: CopyInfo) -> str:
    """Return a CopyState's value; empty if no copy is loaded or loading."""
    if best is _NO_COPY or status.status in (ModelStatus.NOT_LOADED, ModelStatus.NOT_FOUND):
        return ""
    return str(best.model.state) if best.model.state else status.status.name.lower()


def _copy(copy: CopyInfo) -> Copy:
    return Copy(instance_id=copy.instance_id, status=copy.status.name, **msgspec.structs.asdict(copy.model))
