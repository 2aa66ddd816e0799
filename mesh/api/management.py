"""Serves mmesh.ModelMesh, the management API, with ModelMesh's statuses and texts; proto/mmesh/model_mesh.proto specifies each rpc."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from common.clock import epoch_ms
from mesh.errors import InvalidRequest, LoadFailed, MeshError, NotFound
from mesh.registry.models import entry_time_ms
from mesh.registry.records import VModelRecord
from mesh.registry.registry import Registry
from mesh.registry.vmodel_plan import VModelRequest
from mesh.types import Loader, ModelInfo, ModelStatus, StatusInfo
from wire.mmesh import model_mesh_pb2 as pb
from wire.mmesh import model_mesh_pb2_grpc as rpc

MOVE_WAIT_S = 240.0

Answer = TypeVar("Answer")
Context = grpc.aio.ServicerContext[Any, Any]


class ManagementService(rpc.ModelMeshServicer):
    """`check_info` raises InvalidRequest for a model that can never be loaded. `now_ms` is the wall clock.

    `move_wait_s`: how long setVModel with sync waits for a move.
    """

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        *,
        check_info: Callable[[ModelInfo], None] = lambda _: None,
        now_ms: Callable[[], int] = epoch_ms,
        move_wait_s: float = MOVE_WAIT_S,
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._check_info = check_info
        self._now_ms = now_ms
        self._move_wait_s = move_wait_s

    async def registerModel(self, request: pb.RegisterModelRequest, context: Context) -> pb.ModelStatusInfo:
        return await _answered(self._register(request), context)

    async def unregisterModel(self, request: pb.UnregisterModelRequest, context: Context) -> pb.UnregisterModelResponse:
        return await _answered(self._unregister(request), context)

    async def getModelStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.ModelStatusInfo:
        return await _answered(self._get_status(request), context)

    async def ensureLoaded(self, request: pb.EnsureLoadedRequest, context: Context) -> pb.ModelStatusInfo:
        return await _answered(self._ensure_loaded(request), context)

    async def setVModel(self, request: pb.SetVModelRequest, context: Context) -> pb.VModelStatusInfo:
        return await _answered(self._set_vmodel(request), context)

    async def deleteVModel(self, request: pb.DeleteVModelRequest, context: Context) -> pb.DeleteVModelResponse:
        return await _answered(self._delete_vmodel(request), context)

    async def getVModelStatus(self, request: pb.GetVModelStatusRequest, context: Context) -> pb.VModelStatusInfo:
        return await _answered(self._get_vmodel_status(request), context)

    async def _register(self, request: pb.RegisterModelRequest) -> pb.ModelStatusInfo:
        last_used_ms = entry_time_ms(request.lastUsedTime, self._now_ms(), load_now=request.loadNow)
        await self._registry.models.register(request.modelId, self._info(request.modelInfo), last_used_ms=last_used_ms)
        if request.loadNow:
            return _status(await self._load(request.modelId, last_used_ms, wait=request.sync))
        return _status(self._loader.status(request.modelId))

    async def _unregister(self, request: pb.UnregisterModelRequest) -> pb.UnregisterModelResponse:
        _require_id(request.modelId)
        await self._registry.models.unregister(request.modelId)
        return pb.UnregisterModelResponse()

    async def _get_status(self, request: pb.GetStatusRequest) -> pb.ModelStatusInfo:
        _require_id(request.modelId)
        return await self._status_of(request.modelId)

    async def _ensure_loaded(self, request: pb.EnsureLoadedRequest) -> pb.ModelStatusInfo:
        _require_id(request.modelId)
        if await self._registry.models.find(request.modelId) is None:
            raise NotFound("model not found")
        now_ms = self._now_ms()
        last_used_ms = min(request.lastUsedTime, now_ms) or now_ms
        return _status(await self._load(request.modelId, last_used_ms, wait=request.sync))

    async def _set_vmodel(self, request: pb.SetVModelRequest) -> pb.VModelStatusInfo:
        wish = VModelRequest(
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
        vmodel = await self._registry.vmodels.set(wish, now_ms=entry_ms, is_loaded=self._is_loaded)
        if vmodel.moving:
            if request.sync:
                vmodel = await self._moved(request.vModelId, vmodel.target_id)
        elif request.loadNow or had_copies:
            last_used_ms = active.last_used_ms if active and had_copies else entry_ms
            await self._load(vmodel.active_id, last_used_ms, wait=request.sync)
        return await self._vmodel_status(vmodel)

    async def _delete_vmodel(self, request: pb.DeleteVModelRequest) -> pb.DeleteVModelResponse:
        _require_vmodel_id(request.vModelId)
        await self._registry.vmodels.delete(request.vModelId, owner=request.owner)
        return pb.DeleteVModelResponse()

    async def _get_vmodel_status(self, request: pb.GetVModelStatusRequest) -> pb.VModelStatusInfo:
        _require_vmodel_id(request.vModelId)
        vmodel = await self._registry.vmodels.find(request.vModelId)
        if vmodel is None or (request.owner and request.owner != vmodel.owner):
            return pb.VModelStatusInfo()
        return await self._vmodel_status(vmodel)

    async def _load(self, model_id: str, last_used_ms: int, *, wait: bool) -> StatusInfo:
        """Load a model. A failed load is returned as a status, not raised."""
        try:
            return await self._loader.ensure_loaded(model_id, last_used_ms=last_used_ms, wait=wait)
        except LoadFailed as error:
            status = self._loader.status(model_id)
            return StatusInfo(ModelStatus.LOADING_FAILED, status.errors or (error.detail,), status.copies)

    async def _moved(self, vmodel_id: str, target_id: str) -> VModelRecord:
        """Wait until the move to `target_id` is done, has failed or was replaced by another. Raises NotFound if the vmodel was deleted."""

        def ended(vmodel: VModelRecord | None) -> bool:
            return vmodel is None or vmodel.failed or not vmodel.moving or vmodel.target_id != target_id

        try:
            async with asyncio.timeout(self._move_wait_s):
                vmodel = await self._registry.vmodels.table.until(vmodel_id, ended)
        except TimeoutError:
            vmodel = self._registry.vmodels.get(vmodel_id)
        if vmodel is None:
            raise NotFound(f"vmodel {vmodel_id} was deleted while it moved to {target_id}")
        return vmodel

    async def _status_of(self, model_id: str) -> pb.ModelStatusInfo:
        if await self._registry.models.find(model_id) is None:
            return pb.ModelStatusInfo(status=pb.ModelStatusInfo.NOT_FOUND)
        return _status(self._loader.status(model_id))

    async def _vmodel_status(self, vmodel: VModelRecord) -> pb.VModelStatusInfo:
        if not vmodel.moving:
            state = pb.VModelStatusInfo.DEFINED
        else:
            state = pb.VModelStatusInfo.TRANSITION_FAILED if vmodel.failed else pb.VModelStatusInfo.TRANSITIONING
        active = await self._status_of(vmodel.active_id)
        return pb.VModelStatusInfo(
            status=state,
            activeModelId=vmodel.active_id,
            targetModelId=vmodel.target_id,
            activeModelStatus=active,
            targetModelStatus=await self._status_of(vmodel.target_id) if vmodel.moving else active,
            owner=vmodel.owner,
        )

    def _info(self, message: pb.ModelInfo) -> ModelInfo:
        info = ModelInfo(type=message.type, path=message.path, key=message.key)
        self._check_info(info)
        return info

    def _is_loaded(self, model_id: str) -> bool:
        return self._loader.status(model_id).status is ModelStatus.LOADED


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
        raise InvalidRequest("must provide non-empty modelId")


def _require_vmodel_id(vmodel_id: str) -> None:
    if not vmodel_id:
        raise InvalidRequest("must provide non-empty vModelId")


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
