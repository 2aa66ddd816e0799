"""Plans how setting, moving and deleting a vmodel changes the records, as ModelMesh does.

A model's `refs` counts the vmodels whose active or target model it is. A model with `auto_delete` is deleted with its
last reference. Every plan keeps this invariant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from mesh.errors import AlreadyExists, InvalidRequest, NotFound, PreconditionFailed
from mesh.registry.copy_settings import is_same_model
from mesh.registry.models import new_model, with_copy_settings
from mesh.registry.records import ModelRecord, VModelRecord
from mesh.types import ModelInfo


@dataclass(frozen=True, slots=True)
class VModelRequest:
    """setVModel's request. `info` None: the target must exist. Empty `expected_target_id` and `owner` are not checked."""

    vmodel_id: str
    target_id: str
    info: ModelInfo | None = None
    auto_delete: bool = False
    update_only: bool = False
    force: bool = False
    expected_target_id: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class VModelView:
    """The records that a plan depends on. `models` holds the active, target and new target model, None for an absent one."""

    vmodel: VModelRecord | None
    models: Mapping[str, ModelRecord | None]


@dataclass(frozen=True, slots=True)
class VModelPlan:
    """The records to write, None for a deleted one. `models` holds only those that change."""

    vmodel: VModelRecord | None
    models: Mapping[str, ModelRecord | None] = field(default_factory=dict)


def plan_set(
    request: VModelRequest, view: VModelView, *, target_is_loaded: bool, now_ms: int, default_owner: str
) -> VModelPlan:
    """Plan a setVModel. Raises InvalidRequest, NotFound, AlreadyExists, PreconditionFailed, with ModelMesh's texts."""
    vmodel = view.vmodel
    _check(request, view)
    target = view.models.get(request.target_id)
    created = None
    if target is None:
        if request.info is None:
            raise NotFound(f"Target model {request.target_id} not found")
        created = new_model(request.info, last_used_ms=now_ms, auto_delete=request.auto_delete)
    elif request.info is not None and not is_same_model(request.info, target.info):
        raise AlreadyExists(f"Target model {request.target_id} already exists with different attribute values")
    elif request.info is not None:
        target = with_copy_settings(target, request.info)
    if vmodel is None:
        new = VModelRecord(
            owner=request.owner or default_owner, active_id=request.target_id, target_id=request.target_id
        )
        return _plan(view, new, request.target_id, created or target)
    if request.target_id == vmodel.target_id and not (vmodel.is_moving and request.force):
        # KServe's controller sets a vmodel again on each of its events, so a set that changes nothing must write nothing.
        return _plan(view, vmodel, request.target_id, created or target)
    active = view.models.get(vmodel.active_id)
    copies = len(active.instance_ids) if active else 0
    switch = request.force or copies == 0 or request.target_id == vmodel.active_id or (copies == 1 and target_is_loaded)
    new = msgspec.structs.replace(
        vmodel, active_id=request.target_id if switch else vmodel.active_id, target_id=request.target_id, failed=False
    )
    if active is not None:
        # The successor takes the predecessor's place in the LRU order.
        successor = created or target
        assert successor is not None
        last_used_ms = max(active.last_used_ms, 0 if created else successor.last_used_ms)
        entered_ms = (
            min(active.entered_ms, successor.entered_ms)
            if active.is_used or (successor.is_used and not created)
            else last_used_ms
        )
        successor = msgspec.structs.replace(successor, last_used_ms=last_used_ms, entered_ms=entered_ms)
        return _plan(view, new, request.target_id, successor)
    return _plan(view, new, request.target_id, created or target)


def plan_finish(view: VModelView, *, target_id: str) -> VModelPlan:
    """Plan the switch to a loaded target. Changes nothing if the vmodel has been moved elsewhere."""
    vmodel = view.vmodel
    if vmodel is None or vmodel.target_id != target_id or not vmodel.is_moving:
        return VModelPlan(vmodel)
    return _plan(view, msgspec.structs.replace(vmodel, active_id=target_id, failed=False))


def plan_park(view: VModelView, *, target_id: str) -> VModelPlan:
    """Plan the parking of a move whose target could not be loaded. The active model stays."""
    vmodel = view.vmodel
    if vmodel is None or vmodel.target_id != target_id or not vmodel.is_moving:
        return VModelPlan(vmodel)
    return VModelPlan(msgspec.structs.replace(vmodel, failed=True))


def plan_delete(view: VModelView, *, owner: str) -> VModelPlan:
    """Plan a deletion. Changes nothing for an absent vmodel or another owner's."""
    if view.vmodel is None or (owner and owner != view.vmodel.owner):
        return VModelPlan(view.vmodel)
    return _plan(view, None)


def _check(request: VModelRequest, view: VModelView) -> None:
    if not request.vmodel_id:
        raise InvalidRequest("Must provide vModelId")
    if not request.target_id:
        raise InvalidRequest(f"Must provide target modelId for vmodel {request.vmodel_id}")
    vmodel = view.vmodel
    if vmodel is None:
        if request.update_only:
            raise NotFound(f"vmodel {request.vmodel_id} not found")
        if request.expected_target_id and request.expected_target_id != request.target_id:
            raise PreconditionFailed(
                f"vmodel {request.vmodel_id} not found, expected target model {request.expected_target_id}"
            )
        return
    if request.owner and request.owner != vmodel.owner:
        raise AlreadyExists(
            f'vmodel {request.vmodel_id} already exists with different owner "{vmodel.owner or "null"}"'
        )
    if request.expected_target_id and vmodel.target_id not in (request.expected_target_id, request.target_id):
        raise PreconditionFailed(
            f"Existing target model {vmodel.target_id} does not match expected {request.expected_target_id}"
        )


def _plan(
    view: VModelView, new: VModelRecord | None, target_id: str = "", target: ModelRecord | None = None
) -> VModelPlan:
    """Return the plan with the reference counts of all models adjusted. `target` replaces the viewed record of `target_id`."""
    before, after = _model_ids(view.vmodel), _model_ids(new)
    viewed = dict(view.models)
    if target is not None:
        viewed[target_id] = target
    # A referenced model whose record was missing and is created now gets its reference again.
    planned = {
        model_id: _with_refs(viewed.get(model_id), +1)
        for model_id in after
        if model_id not in before or not view.models.get(model_id)
    }
    planned |= {model_id: _with_refs(viewed.get(model_id), -1) for model_id in before - after}
    if target is not None:
        planned.setdefault(target_id, target)
    return VModelPlan(
        new, {model_id: model for model_id, model in planned.items() if model != view.models.get(model_id)}
    )


def _model_ids(vmodel: VModelRecord | None) -> set[str]:
    return {vmodel.active_id, vmodel.target_id} - {""} if vmodel else set()


def _with_refs(model: ModelRecord | None, change: int) -> ModelRecord | None:
    if model is None:
        return None
    refs = max(0, model.refs + change)
    return None if change < 0 and refs == 0 and model.auto_delete else msgspec.structs.replace(model, refs=refs)
