"""The fake runtime's own gRPC services: mmesh.ModelRuntime and repertory.RuntimeState."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from common.unload_headers import RETRY_HEADER
from wire.mmesh import model_runtime_pb2 as pb
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeServicer
from wire.repertory import runtime_pb2 as state_pb
from wire.repertory.runtime_pb2_grpc import RuntimeStateServicer

if TYPE_CHECKING:
    from tests.support.fake_runtime import FakeRuntime


class FakeSpi(ModelRuntimeServicer):
    def __init__(self, runtime: "FakeRuntime") -> None:
        self._runtime = runtime

    async def runtimeStatus(self, request: pb.RuntimeStatusRequest, context: Any) -> pb.RuntimeStatusResponse:
        runtime, switches = self._runtime, self._runtime.switches
        runtime.loaded.clear()
        runtime.log.append(("purge", ""))
        methods = {
            name: pb.RuntimeStatusResponse.MethodInfo(idInjectionPath=path) for name, path in switches.methods.items()
        }
        return pb.RuntimeStatusResponse(
            status=pb.RuntimeStatusResponse.READY,
            capacityInBytes=switches.capacity_bytes,
            maxLoadingConcurrency=switches.loading_concurrency,
            modelLoadingTimeoutMs=30_000,
            defaultModelSizeInBytes=switches.default_size_bytes,
            runtimeVersion="fake",
            methodInfos=methods,
            limitModelConcurrency=switches.max_concurrency != 0,
            allowAnyMethod=True,
        )

    async def loadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        runtime, switches = self._runtime, self._runtime.switches
        runtime.log.append(("load", request.modelId))
        await runtime.while_frozen()
        if request.modelId in switches.quarantined:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.modelId} is quarantined")
        if request.modelId not in runtime.loaded:
            runtime.loading.add(request.modelId)
            runtime.tell()
            try:
                if switches.load_gate is not None:
                    await switches.load_gate.wait()
                await asyncio.sleep(switches.load_s)
            finally:
                runtime.loading.discard(request.modelId)
            if switches.full_disk:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the disk is full")
            if request.modelPath in switches.crash:
                await context.abort(grpc.StatusCode.INTERNAL, "a step crashed")
            if request.modelPath in switches.fail:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, switches.fail[request.modelPath])
            size = runtime.size_of(request.modelPath)
            if size > switches.capacity_bytes and not switches.overcommits:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{size} bytes exceed the capacity")
            used_bytes = runtime.used_bytes() + switches.hidden_bytes
            if used_bytes + size > switches.capacity_bytes and not switches.overcommits:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{size} bytes do not fit")
            runtime.loaded[request.modelId] = request.modelPath
            runtime.tell()
        return pb.LoadModelResponse(
            sizeInBytes=runtime.size_of(request.modelPath), maxConcurrency=max(switches.max_concurrency, 0)
        )

    async def unloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        runtime = self._runtime
        runtime.log.append(("unload", request.modelId))
        runtime.metadata.append(tuple(context.invocation_metadata()))
        if request.modelId in runtime.switches.quarantined and (RETRY_HEADER, "1") in runtime.metadata[-1]:
            runtime.switches.quarantined.discard(request.modelId)
            runtime.tell()
        if runtime.loaded.pop(request.modelId, None) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.modelId} is not loaded")
        runtime.tell()
        return pb.UnloadModelResponse()

    async def predictModelSize(self, request: pb.PredictModelSizeRequest, context: Any) -> pb.PredictModelSizeResponse:
        predicted = self._runtime.switches.predicted_bytes
        return pb.PredictModelSizeResponse(sizeInBytes=predicted or self._runtime.size_of(request.modelPath))

    async def modelSize(self, request: pb.ModelSizeRequest, context: Any) -> pb.ModelSizeResponse:
        return pb.ModelSizeResponse(sizeInBytes=self._runtime.size_of(self._runtime.loaded.get(request.modelId, "")))


class FakeState(RuntimeStateServicer):
    def __init__(self, runtime: "FakeRuntime") -> None:
        self._runtime = runtime

    async def watch(self, request: state_pb.WatchRequest, context: Any) -> AsyncIterator[state_pb.RuntimeSnapshot]:
        runtime = self._runtime
        while True:
            await runtime.while_frozen()
            changed = runtime.changed
            yield self._snapshot()
            await changed.wait()

    async def listFiles(self, request: state_pb.ListFilesRequest, context: Any) -> state_pb.ListFilesResponse:
        return state_pb.ListFilesResponse(files=self._runtime.files, budget_bytes=1 << 30)

    async def dropFiles(self, request: state_pb.DropFilesRequest, context: Any) -> state_pb.DropFilesResponse:
        asked = [file for file in self._runtime.files if file.key in request.keys]
        dropped = [file for file in asked if not file.in_use]
        self._runtime.files = [file for file in self._runtime.files if file not in dropped]
        freed_bytes = sum(file.size_bytes for file in dropped)
        return state_pb.DropFilesResponse(freed_bytes=freed_bytes, num_in_use=len(asked) - len(dropped))

    async def fit(self, request: state_pb.FitRequest, context: Any) -> state_pb.FitResponse:
        self._runtime.fits.append(request)
        if request.model_path in self._runtime.switches.invalid:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self._runtime.switches.invalid[request.model_path])
        if request.model_path in self._runtime.switches.unreadable:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, self._runtime.switches.unreadable[request.model_path]
            )
        size = self._runtime.size_of(request.model_path)
        fits = size <= self._runtime.switches.capacity_bytes
        return state_pb.FitResponse(
            fits=fits,
            reason="" if fits else "too large",
            capacity_bytes=self._runtime.switches.capacity_bytes,
            exact=True,
            **{"weight_bytes": size, **self._runtime.switches.unpacking.get(request.model_path, {})},
        )

    def _snapshot(self) -> state_pb.RuntimeSnapshot:
        runtime = self._runtime
        models = [
            state_pb.ModelState(
                model_id=model_id,
                state=state_pb.ModelState.LOADED,
                tier=state_pb.ModelState.DEVICE,
                weight_bytes=runtime.size_of(path),
                running=runtime.switches.sequences + runtime.computing[model_id],
                waiting=runtime.switches.queued,
                busy_s=runtime.switches.busy_s,
                max_model_len=runtime.switches.context[0],
                wanted_model_len=runtime.switches.context[1],
            )
            for model_id, path in runtime.loaded.items()
        ]
        models += [
            state_pb.ModelState(
                model_id=model_id,
                state=state_pb.ModelState.LOADING if runtime.switches.is_reading else state_pb.ModelState.PULLING,
                progress=runtime.switches.progress,
                progress_text="of the files",
            )
            for model_id in runtime.loading
        ]
        models += [
            state_pb.ModelState(
                model_id=model_id, state=state_pb.ModelState.QUARANTINED, error=f"{model_id} is quarantined"
            )
            for model_id in runtime.switches.quarantined
        ]
        return state_pb.RuntimeSnapshot(
            capacity_bytes=runtime.switches.capacity_bytes,
            device_budget_bytes=runtime.switches.capacity_bytes,
            device_used_bytes=runtime.used_bytes(),
            engine_state=state_pb.ENGINE_READY if runtime.switches.engine_ready else state_pb.ENGINE_RESTARTING,
            models=models,
        )
