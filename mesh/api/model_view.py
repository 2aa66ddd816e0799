"""A registered model as people see it: one name, its settings, its state over all pods. Reads the registry and the loader; changes nothing."""

from collections.abc import Callable
from typing import Any

from mesh.client.admin import Copy, Model
from mesh.registry.records import ModelRecord
from mesh.registry.registration import belongs_to, settings_of
from mesh.registry.registry import NamedModel, Registry
from mesh.types import CopyInfo, CopyState, Loader, ModelStatus, StatusInfo, Tier

_NEAREST = (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.REMOTE)
_MOST_SETTINGS = 10_000
_COMING = (CopyState.LOADING, CopyState.PACKING, CopyState.PULLING, CopyState.QUEUED)


class ModelViews:
    """`last_used_ms` tells when this pod last used a model; 0 = not that it knew."""

    def __init__(self, registry: Registry, loader: Loader, last_used_ms: Callable[[str], int]) -> None:
        self._registry = registry
        self._loader = loader
        self._last_used_ms = last_used_ms
        self._settings: dict[str, dict[str, Any]] = {}  # by model key

    def all(self) -> list[Model]:
        return [self._view(named) for named in self._registry.named()]

    def states(self) -> list[tuple[str, Model | None]]:
        """As all, by name; None: it is at rest, loaded nowhere and well. Of thousands of names most are."""
        named = self._registry.named()
        return [(each.name, None if self._rests(each) else self._view(each)) for each in named]

    async def one(self, name: str) -> Model:
        """By name or concrete id. Raises NotFound."""
        model_id = await self._registry.resolve_fresh(name)
        named = self._registry.find_named(name)
        if named is None:
            record = self._registry.models.get(model_id)
            assert record is not None
            named = NamedModel(name, model_id, model_id, record)
        return self._view(named)

    def _rests(self, named: NamedModel) -> bool:
        return named.target_id == named.model_id and not self._loader.status(named.model_id).copies

    def _view(self, named: NamedModel) -> Model:
        status = self._loader.status(named.model_id)
        # a name that moves shows how far the files are that it moves to
        coming = self._loader.status(named.target_id) if named.target_id != named.model_id else status
        best = _best(status)
        step = _best(coming) if coming is not status and coming.status is not ModelStatus.LOADED else best
        successor = self._registry.models.get(named.target_id) if named.target_id != named.model_id else None
        last_used_ms = max(self._last_used_ms(named.model_id), named.record.last_used_ms)
        settings = self._settings_of(named.record)
        return Model(
            name=named.name,
            model_id=named.model_id,
            uri=named.record.path,
            type=named.record.type,
            settings=settings,
            status=status.status.name,
            state=_state(status, best),
            tier=best.tier or "" if best and best.status is ModelStatus.LOADED else "",
            weight_bytes=(best.weight_bytes if best else 0) or named.record.weight_bytes,
            device_bytes=sum(copy.device_bytes for copy in status.copies),
            quantization=(best.quantization if best else "") or str(settings.get("quantize") or ""),
            copies=[_copy(copy) for copy in status.copies],
            last_used_ms=last_used_ms if last_used_ms > named.record.entered_ms else 0,
            running=sum(copy.running for copy in status.copies),
            waiting=sum(copy.waiting for copy in status.copies),
            progress=step.progress if step else 0.0,
            progress_text=step.progress_text if step else "",
            error=_error(status, coming, successor.path if successor and named.move_failed else ""),
            moving_to=successor.path if successor else "",
            aliases=list(named.aliases),
            alias_of=self._alias_of(named),
        )

    def _settings_of(self, record: ModelRecord) -> dict[str, Any]:
        settings = self._settings.get(record.key)
        if settings is None:
            if len(self._settings) > _MOST_SETTINGS:
                self._settings.clear()
            known = settings_of(record.info)
            settings = self._settings[record.key] = {
                key: known[key] for key in known if key not in ("display_name", "model_type")
            }
        return settings

    def _alias_of(self, named: NamedModel) -> str:
        if (
            named.name == named.model_id
            or belongs_to(named.model_id, named.name)
            or belongs_to(named.target_id, named.name)
        ):
            return ""
        owner = self._registry.name_of(named.model_id)
        # a model that lives by its vmodels alone, as a platform's own do, has no better name than theirs
        return "" if owner == named.model_id and named.record.auto_delete else owner


def _best(status: StatusInfo) -> CopyInfo | None:
    """The copy that tells most: a loaded one in the nearest tier, else the one furthest on its way, else the newest."""
    loaded = [copy for copy in status.copies if copy.status is ModelStatus.LOADED]
    if loaded:
        return min(loaded, key=lambda copy: _NEAREST.index(copy.tier) if copy.tier else len(_NEAREST))
    coming = [copy for copy in status.copies if copy.state in _COMING]
    if coming:
        return min(coming, key=lambda copy: _COMING.index(copy.state) if copy.state in _COMING else 0)
    return status.copies[0] if status.copies else None


def _error(status: StatusInfo, coming: StatusInfo, failed_path: str) -> str:
    """`failed_path`: of the files that the name should have gone over to; what it has goes on answering."""
    if failed_path:
        return f"{failed_path} can't take its place: {coming.errors[0] if coming.errors else 'it failed to load'}"
    if status.status is ModelStatus.LOADED:
        return ""
    errors = status.errors or coming.errors
    return errors[0] if errors else ""


def _state(status: StatusInfo, best: CopyInfo | None) -> str:
    """A CopyState's value; empty: not loaded anywhere."""
    if best is None or status.status in (ModelStatus.NOT_LOADED, ModelStatus.NOT_FOUND):
        return ""
    return str(best.state) if best.state else status.status.name.lower()


def _copy(copy: CopyInfo) -> Copy:
    return Copy(
        instance_id=copy.instance_id,
        status=copy.status.name,
        state=copy.state or "",
        tier=copy.tier or "",
        error=copy.error,
        progress=copy.progress,
        progress_text=copy.progress_text,
        weight_bytes=copy.weight_bytes,
        device_bytes=copy.device_bytes,
        running=copy.running,
        waiting=copy.waiting,
    )
