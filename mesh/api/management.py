"""Serves mmesh.ModelMesh, the management API, with ModelMesh's statuses and texts; proto/mmesh/model_mesh.proto specifies each rpc."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from common.clock import epoch_ms
from common.model_fit import ModelFit, unpacking_text
from mesh.access.caller import current_caller
from mesh.errors import InvalidRequest, LoadFailed, MeshError, NotFound, Unavailable
from mesh.registry.models import entry_time_ms
from mesh.registry.records import VModelRecord
from mesh.registry.registration import check_id
from mesh.registry.registry import Registry
from mesh.registry.vmodel_plan import VModelRequest
from mesh.types import Loader, ModelInfo, ModelStatus, ModelStatuses, StatusInfo
from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh import model_mesh_pb2_grpc as rpc

MOVE_WAIT_S = 240.0
GET_STATE_ID = "***GETSTATE***"
_NO_ID = "must provide non-empty modelId"

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Context = grpc.aio.ServicerContext[Any, Any]


class ManagementService(rpc.ModelMeshServicer):
    """`check_info` raises InvalidRequest for a model that can never be loaded. `now_ms` is the wall clock.

    `fit_of` returns what a model needs, or None if that is unknown; without it, registrations of GGUF files carry no warning.
    `move_wait_s`: how long setVModel with sync waits for a move.
    """

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        states: ModelStatuses,
        *,
        check_info: Callable[[ModelInfo], None] = lambda _: None,
        fit_of: Callable[[ModelInfo], Awaitable[ModelFit | None]] | None = None,
        now_ms: Callable[[], int] = epoch_ms,
        move_wait_s: float = MOVE_WAIT_S,
        read_only: bool = False,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._states = states
        self._check_info = check_info
        self._fit_of = fit_of
        self._now_ms = now_ms
        self._move_wait_s = move_wait_s
        self._read_only = read_only

    async def registerModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.ModelStatusInfo:
        status = await _answered(self._register(request), context)
        await self._warn_of_unpacking(request.modelId, request.modelInfo, context)
        return status

    async def unregisterModel(self, request: pb.UnregisterModelRequest, context: Context) -> pb.UnregisterModelResponse:
        return await _answered(self._unregister(request), context)

    async def getModelStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.ModelStatusInfo:
        return await _answered(self._get_status(request), context)

    async def ensureLoaded(self, request: pb.EnsureLoadedRequest, context: Context) -> pb.ModelStatusInfo:
        return await _answered(self._ensure_loaded(request), context)

    async def setVModel(self, request: pb.SetVModelRequest, context: Context) -> pb.VModelStatusInfo:
        status = await _answered(self._set_vmodel(request), context)
        if request.HasField("modelInfo"):
            await self._warn_of_unpacking(request.targetModelId, request.modelInfo, context)
        return status

    async def deleteVModel(self, request: pb.DeleteVModelRequest, context: Context) -> pb.DeleteVModelResponse:
        return await _answered(self._delete_vmodel(request), context)

    async def getVModelStatus(self, request: pb.GetVModelStatusRequest, context: Context) -> pb.VModelStatusInfo:
        return await _answered(self._get_vmodel_status(request), context)

    async def _register(self, request: pb.RegisterModelRequest) -> pb.ModelStatusInfo:
        if self._read_only:
            raise MeshError(f"Failed to add model {request.modelId}: this mesh is read-only")
        _check_given(request.modelId)
        last_used_ms = entry_time_ms(request.lastUsedTime, self._now_ms(), load_now=request.loadNow)
        # A load writes the time of last use itself, in the same update.
        await self._registry.models.register(
            request.modelId, self._info(request.modelInfo), last_used_ms=last_used_ms, touch=not request.loadNow
        )
        if request.loadNow:
            return _status(await self._load(request.modelId, last_used_ms, wait=request.sync))
        return _status(self._states.status(request.modelId))

    async def _warn_of_unpacking(self, model_id: str, message: pb.ModelInfo, context: Context) -> None:
        """Set the trailing metadata `warning` if the model is a GGUF file whose blocks take more memory once they are loaded.

        Other registrations are answered without a look at the files, which takes up to a few seconds.
        """
        if self._fit_of is None or "gguf" not in message.path.lower():
            return
        try:
            fit = await self._fit_of(ModelInfo(type=message.type, path=message.path, key=message.key))
        except MeshError as error:
            _LOG.debug("what %s takes is unknown: %s", model_id, error)
            return
        if fit is not None and (text := unpacking_text(model_id, fit, _in_key)):
            # Metadata is ASCII, and an id need not be.
            context.set_trailing_metadata((("warning", text.encode("ascii", "backslashreplace").decode()),))

    async def _unregister(self, request: pb.UnregisterModelRequest) -> pb.UnregisterModelResponse:
        # The naming rule does not apply: an id that a ModelMesh pod has registered must be removable.
        if not request.modelId:
            raise InvalidRequest(_NO_ID)
        current_caller().check_model(request.modelId)
        if self._read_only:
            raise MeshError("model-mesh read-only mode")
        await self._registry.models.unregister(request.modelId)
        return pb.UnregisterModelResponse()

    async def _get_status(self, request: pb.GetStatusRequest) -> pb.ModelStatusInfo:
        _require_id(request.modelId)
        if request.modelId == GET_STATE_ID:
            return self._state()
        model_id = await self._concrete(request.modelId)
        return await self._status_of(request.modelId if model_id is None else model_id)

    async def _ensure_loaded(self, request: pb.EnsureLoadedRequest) -> pb.ModelStatusInfo:
        _require_id(request.modelId)
        model_id = await self._concrete(request.modelId)
        if model_id is None:
            raise NotFound("model not found")
        now_ms = self._now_ms()
        last_used_ms = min(max(request.lastUsedTime, 0), now_ms) or now_ms
        return _status(await self._load(model_id, last_used_ms, wait=request.sync))

    async def _set_vmodel(self, request: pb.SetVModelRequest) -> pb.VModelStatusInfo:
        if self._read_only:
            raise Unavailable("model-mesh is in read-only mode")
        _check_given(request.vModelId, "vmodel id")
        _check_given(request.targetModelId)
        vmodel_request = VModelRequest(
            vmodel_id=request.vModelId,
            target_id=request.targetModelId,
            info=self._info(request.modelInfo) if request.HasField("modelInfo") else None,
            auto_delete=request.autoDeleteTargetModel,
            update_only=request.updateOnly,
            force=request.force,
            expected_target_id=request.expectedTargetModelId,
            owner=request.owner,
        )
        # A target that this call registers enters the LRU order as any registered model does.
        entry_ms = entry_time_ms(0, self._now_ms(), load_now=request.loadNow)
        before = self._registry.vmodels.get(request.vModelId)
        active = self._registry.models.get(before.active_id) if before else None
        had_copies = active is not None and bool(active.instance_ids)
        vmodel = await self._registry.vmodels.set(vmodel_request, now_ms=entry_ms, is_loaded=self._is_loaded)
        if vmodel.is_moving:
            if request.sync:
                vmodel = await self._moved(request.vModelId, vmodel.target_id)
        elif request.loadNow or had_copies:
            last_used_ms = active.last_used_ms if active and had_copies else entry_ms
            loaded = await self._load(vmodel.active_id, last_used_ms, wait=request.sync)
            return await self._vmodel_status(vmodel, active=_status(loaded))
        return await self._vmodel_status(vmodel)

    async def _delete_vmodel(self, request: pb.DeleteVModelRequest) -> pb.DeleteVModelResponse:
        current_caller().check_model(request.vModelId)
        if request.vModelId and not self._read_only:
            await self._registry.vmodels.delete(request.vModelId, owner=request.owner)
        return pb.DeleteVModelResponse()

    async def _get_vmodel_status(self, request: pb.GetVModelStatusRequest) -> pb.VModelStatusInfo:
        _check_given(request.vModelId, "vmodel id")
        vmodel = await self._registry.vmodels.table.refresh(request.vModelId) if request.vModelId else None
        if vmodel is None or (request.owner and request.owner != vmodel.owner):
            return pb.VModelStatusInfo()
        return await self._vmodel_status(vmodel)

    async def _concrete(self, name: str) -> str | None:
        """Return the id itself if it is a model's, or that of the model that a vmodel of this name stands for; None if there is neither.

        ModelMesh takes model ids only. A name that `register` has made is a vmodel, and people ask by it.
        """
        if await self._registry.models.find(name) is not None:
            return name
        vmodel = await self._registry.vmodels.find(name)
        return vmodel.active_id if vmodel is not None else None

    async def _load(self, model_id: str, last_used_ms: int, *, wait: bool) -> StatusInfo:
        """Load the model and return its status. A load that fails is an answer, not an error."""
        try:
            status = await self._loader.ensure_loaded(model_id, last_used_ms=last_used_ms, wait=wait)
        except LoadFailed as error:
            status = self._states.status(model_id)
            return StatusInfo(ModelStatus.LOADING_FAILED, status.errors or (error.detail,), status.copies)
        if status.status is ModelStatus.LOADING and await self._refresh_peers(status):
            return self._states.status(model_id)
        return status

    async def _moved(self, vmodel_id: str, target_id: str) -> VModelRecord:
        """Wait until the move to `target_id` is done, has failed or was replaced by another. Raises NotFound if the vmodel was deleted."""

        def ended(vmodel: VModelRecord | None) -> bool:
            return vmodel is None or vmodel.failed or not vmodel.is_moving or vmodel.target_id != target_id

        try:
            async with asyncio.timeout(self._move_wait_s):
                vmodel = await self._registry.vmodels.table.until(vmodel_id, ended)
        except TimeoutError:
            vmodel = self._registry.vmodels.get(vmodel_id)
        if vmodel is None:
            raise NotFound(f"vmodel {vmodel_id} was deleted while it moved to {target_id}")
        return vmodel

    async def _status_of(self, model_id: str) -> pb.ModelStatusInfo:
        """Return the present status. It includes what another pod has just answered to a synchronous call."""
        if await self._registry.models.table.refresh(model_id) is None:
            return pb.ModelStatusInfo(status=pb.ModelStatusInfo.NOT_FOUND)
        status = self._states.status(model_id)
        if status.status is ModelStatus.LOADING and await self._refresh_peers(status):
            status = self._states.status(model_id)
        return _status(status)

    def _state(self) -> pb.ModelStatusInfo:
        """Describe this pod and the mesh in text, one line per error, as ModelMesh does for the id that no model can have."""
        instances = self._registry.instances
        own = instances.get(instances.own_id)
        lines = [
            f"This instance: {instances.own_id}",
            f"Local clock time: {self._now_ms()}",
            f"Registered models: {len(self._registry.models.table)}, vmodels: {len(self._registry.vmodels.table)}",
        ]
        lines += [f"Model {model_id}: {state.state}" for model_id, state in (own.copies.items() if own else ())]
        lines += [
            f"Instance {instance_id}: {pod.count} models, {pod.used_units} of {pod.capacity_units} units of 8 KiB"
            for instance_id, pod in instances.items()
        ]
        return pb.ModelStatusInfo(status=pb.ModelStatusInfo.UNKNOWN, errors=[f"CACHESTATE: {line}" for line in lines])

    async def _refresh_peers(self, status: StatusInfo) -> bool:
        """Read the records of the pods that load the model from the store itself, and return whether there are any.

        A pod that has answered LOADED has written its record before, so every pod says LOADED from then on, as in ModelMesh.
        """
        instances = self._registry.instances
        peers = [copy.instance_id for copy in status.copies if copy.instance_id != instances.own_id]
        for instance_id in peers:
            await instances.refresh(instance_id)
        return bool(peers)

    async def _vmodel_status(
        self, vmodel: VModelRecord, active: pb.ModelStatusInfo | None = None
    ) -> pb.VModelStatusInfo:
        """`active`: the active model's status, if the caller has it."""
        if not vmodel.is_moving:
            state = pb.VModelStatusInfo.DEFINED
        else:
            state = pb.VModelStatusInfo.TRANSITION_FAILED if vmodel.failed else pb.VModelStatusInfo.TRANSITIONING
        info = pb.VModelStatusInfo(
            status=state,
            activeModelId=vmodel.active_id,
            targetModelId=vmodel.target_id,
            activeModelStatus=active or await self._status_of(vmodel.active_id),
            owner=vmodel.owner,
        )
        if vmodel.is_moving:
            target = await self._status_of(vmodel.target_id)
            if not vmodel.failed and target.status != pb.ModelStatusInfo.LOADED:
                # A move tries several pods, so a failure so far is not yet the result.
                target = pb.ModelStatusInfo(status=pb.ModelStatusInfo.LOADING)
            info.targetModelStatus.CopyFrom(target)
        return info

    def _info(self, message: pb.ModelInfo) -> ModelInfo:
        info = ModelInfo(type=message.type, path=message.path, key=message.key)
        self._check_info(info)
        return info

    def _is_loaded(self, model_id: str) -> bool:
        return self._states.status(model_id).status is ModelStatus.LOADED


async def _answered(work: Awaitable[Answer], context: Context) -> Answer:
    """Return the result; a MeshError ends the call with its status."""
    try:
        return await work
    except MeshError as error:
        return await _abort(error, context)


async def _abort(error: MeshError, context: Context) -> NoReturn:
    trailer = (("retry-after", str(max(1, round(error.retry_after_s)))),) if error.retry_after_s is not None else ()
    await context.abort(grpc.StatusCode[error.code], error.message, trailer)


def _require_id(model_id: str) -> None:
    if not model_id:
        raise InvalidRequest(_NO_ID)
    _check_given(model_id)


def _check_given(model_id: str, what: str = "model id") -> None:
    """Check an id, unless it is left out, by the naming rule and the models of the caller's key. Raises InvalidRequest, PermissionDenied."""
    if model_id:
        check_id(model_id, what)
        current_caller().check_model(model_id)


def _status(info: StatusInfo) -> pb.ModelStatusInfo:
    copies = sorted(info.copies, key=lambda copy: copy.time_ms, reverse=True)
    return pb.ModelStatusInfo(
        status=info.status.name,
        errors=info.errors,
        modelCopyInfos=[
            pb.ModelStatusInfo.ModelCopyInfo(location=copy.instance_id, copyStatus=copy.status.name, time=copy.time_ms)
            for copy in copies
        ],
    )


def _in_key(setting: str, value: str) -> str:
    return f'"{setting}": "{value}" in its key'
