"""Calls the local runtime over gRPC (mmesh.ModelRuntime) and turns its status codes into the mesh's errors.

Only one mesh may use a runtime, because runtimeStatus purges its models.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc
import grpc.aio

from common.model_fit import ModelFit
from common.unload_headers import GRACE_HEADER, RETRY_HEADER
from mesh.client.runtime_state import RuntimeWatch, fit_answer
from mesh.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LoadFailed,
    MeshError,
    NotFound,
    NotSupported,
    Overloaded,
    Unavailable,
)
from mesh.types import CachedFiles, LoadAnswer, ModelInfo, RuntimeLimits, RuntimeSnapshot
from wire.mmesh import model_runtime_pb2 as pb
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeStub
from wire.repertory import runtime_pb2 as state_pb
from wire.repertory.runtime_pb2_grpc import RuntimeStateStub

logger = logging.getLogger(__name__)

_POLLS_S = (0.05, 0.1, 0.2, 0.5, 1.0)  # then every _POLL_S, as in ModelMesh
_POLL_S = 2.0
_ATTEMPT_S = 10.0  # for one poll, during which the runtime may purge its models
_PREDICT_S = 0.5
_SIZE_S = 30.0
_UNLOAD_S = 180.0  # Another runtime may wait for the model's requests. The caller repeats the call after this time.
_FIT_S = 120.0  # the checkpoint may have to be inspected at its source
_FILES_S = 60.0  # dropping terabytes takes a while
_MIN_LOADING_TIMEOUT_MS = 100
_LASTING = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)
_AT_ONCE = ((GRACE_HEADER, "0"),)
_ALLOW_RETRY = (*_AT_ONCE, (RETRY_HEADER, "1"))


class GrpcRuntime:
    """Implements mesh.types.RuntimeClient. The caller closes the channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = ModelRuntimeStub(channel)
        self._state = RuntimeStateStub(channel)
        self._channel = channel
        self._predicts = True
        self._limits: RuntimeLimits | None = None

    async def wait_ready(self, timeout_s: float) -> RuntimeLimits:
        """Poll until READY. Raises Unavailable after the time or on status FAILING, InvalidRequest for impossible limits."""
        give_up_s = time.monotonic() + timeout_s
        last = "it did not answer"
        pauses = iter(_POLLS_S)
        while True:
            try:
                answer = await self._stub.runtimeStatus(pb.RuntimeStatusRequest(), timeout=_ATTEMPT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise Unavailable("the runtime does not offer mmesh.ModelRuntime") from None
                last = f"{error.code().name}: {error.details()}"
            else:
                if answer.status == pb.RuntimeStatusResponse.READY:
                    self._limits = _limits(answer)
                    return self._limits
                if answer.status != pb.RuntimeStatusResponse.STARTING:
                    raise Unavailable("the runtime reports that it cannot become ready (status FAILING)")
                last = "it is still starting"
            pause_s = next(pauses, _POLL_S)
            if time.monotonic() + pause_s > give_up_s:
                raise Unavailable(f"the runtime is not ready after {timeout_s:.0f} s: {last}")
            await asyncio.sleep(pause_s)

    async def load(self, model_id: str, info: ModelInfo, timeout_s: float) -> LoadAnswer:
        """Load a model. On any failure, unload it: the runtime must not keep partial state."""
        request = pb.LoadModelRequest(modelId=model_id, modelType=info.type, modelPath=info.path, modelKey=info.key)
        is_kept = False
        begun_s = time.monotonic()
        try:
            answer = await self._stub.loadModel(request, timeout=timeout_s)
            size_bytes, sizing_s = answer.sizeInBytes, 0.0
            if not size_bytes:
                sizing_from_s = time.monotonic()
                size_bytes = await self._size_bytes(model_id)
                sizing_s = time.monotonic() - sizing_from_s
            is_kept = True
        except grpc.aio.AioRpcError as error:
            connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
            raise _load_error(
                model_id, error, timeout_s, connected=connected, is_late=time.monotonic() >= begun_s + timeout_s
            ) from None
        finally:
            if not is_kept:
                await self.undo_load(model_id)
        return LoadAnswer(size_bytes, self._max_concurrency(model_id, answer.maxConcurrency), sizing_s)

    async def _size_bytes(self, model_id: str) -> int:
        """Return the size of a loaded model, 0 if the runtime does not say it."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            return (await self._stub.modelSize(pb.ModelSizeRequest(modelId=model_id), timeout=_SIZE_S)).sizeInBytes
        return 0

    def _max_concurrency(self, model_id: str, reported: int) -> int:
        if self._limits is None or not self._limits.limit_model_concurrency:
            return 0
        if reported < 1:
            logger.warning(
                "model %s: the runtime limits concurrency but reports no limit; the limit is one request", model_id
            )
        return max(reported, 1)

    async def unload(self, model_id: str, *, allow_retry: bool = False) -> None:
        """Unload a model. Raises Unavailable if its memory is not free; the caller tries again."""
        metadata = _ALLOW_RETRY if allow_retry else _AT_ONCE
        try:
            await self._stub.unloadModel(pb.UnloadModelRequest(modelId=model_id), timeout=_UNLOAD_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise Unavailable(
                    f"the runtime could not unload it: {error.code().name}: {error.details()}", model=model_id
                ) from None

    async def predict_size(self, model_id: str, info: ModelInfo) -> int | None:
        """Return the predicted size in bytes, None if unknown. A runtime without the method is not called again."""
        if not self._predicts:
            return None
        request = pb.PredictModelSizeRequest(
            modelId=model_id, modelType=info.type, modelPath=info.path, modelKey=info.key
        )
        try:
            return (await self._stub.predictModelSize(request, timeout=_PREDICT_S)).sizeInBytes or None
        except grpc.aio.AioRpcError as error:
            self._predicts = error.code() is not grpc.StatusCode.UNIMPLEMENTED
            return None

    async def fit(self, model_id: str, info: ModelInfo, *, sizes_only: bool = False) -> ModelFit:
        """Raises NotSupported for a foreign runtime, InvalidRequest, LoadFailed (files missing or unsupported), Unavailable, DeadlineExceeded."""
        try:
            request = state_pb.FitRequest(
                model_id=model_id, model_path=info.path, model_key=info.key, sizes_only=sizes_only
            )
            return fit_answer(await self._state.fit(request, timeout=_FIT_S))
        except grpc.aio.AioRpcError as error:
            kinds: dict[grpc.StatusCode, type[MeshError]] = {
                grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
                grpc.StatusCode.FAILED_PRECONDITION: LoadFailed,
                grpc.StatusCode.NOT_FOUND: NotFound,
                grpc.StatusCode.UNIMPLEMENTED: NotSupported,
                grpc.StatusCode.UNAVAILABLE: Unavailable,
                grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
            }
            message = error.details() or error.code().name
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                message = f"{info.path}: this runtime cannot predict whether a model fits"
            raise kinds.get(error.code(), MeshError)(message) from None

    async def list_files(self) -> tuple[int, list[CachedFiles]]:
        with _file_errors():
            answer = await self._state.listFiles(state_pb.ListFilesRequest(), timeout=_FILES_S)
        found = [
            CachedFiles(file.key, file.kind, file.uri, file.size_bytes, file.last_used_ms, file.in_use)
            for file in answer.files
        ]
        return answer.budget_bytes, found

    async def drop_files(self, keys: Sequence[str]) -> tuple[int, int]:
        with _file_errors():
            answer = await self._state.dropFiles(state_pb.DropFilesRequest(keys=keys), timeout=_FILES_S)
        return answer.freed_bytes, answer.num_in_use

    async def look(self) -> RuntimeSnapshot | None:
        return await self._watch().look()

    def watch(self) -> AsyncIterator[RuntimeSnapshot]:
        return self._watch().snapshots()

    def _watch(self) -> RuntimeWatch:
        return RuntimeWatch(self._channel, self._limits.capacity_bytes if self._limits else 0)

    async def undo_load(self, model_id: str) -> None:
        """Implement RuntimeClient. An error is ignored: the runtime itself drops failed loads."""
        undo = asyncio.ensure_future(self.unload(model_id))
        try:
            with contextlib.suppress(Unavailable):
                await asyncio.shield(undo)
        except asyncio.CancelledError:
            undo.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    """Turn gRPC's errors of listFiles and dropFiles into the mesh's."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        # A foreign runtime may look for a model even where the method is unknown.
        if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND):
            raise NotSupported("this runtime has no disk cache that can be listed") from None
        raise Unavailable(error.details() or error.code().name) from None


def _limits(answer: pb.RuntimeStatusResponse) -> RuntimeLimits:
    if answer.maxLoadingConcurrency < 1:
        raise InvalidRequest(
            f"the runtime's maxLoadingConcurrency is {answer.maxLoadingConcurrency}; it must be at least 1"
        )
    if answer.modelLoadingTimeoutMs < _MIN_LOADING_TIMEOUT_MS:
        raise InvalidRequest(
            f"the runtime's modelLoadingTimeoutMs is {answer.modelLoadingTimeoutMs}; it must be at least {_MIN_LOADING_TIMEOUT_MS}"
        )
    methods = {name: tuple(info.idInjectionPath) for name, info in answer.methodInfos.items()}
    return RuntimeLimits(
        capacity_bytes=answer.capacityInBytes,
        max_loading_concurrency=answer.maxLoadingConcurrency,
        model_loading_timeout_s=answer.modelLoadingTimeoutMs / 1000,
        default_model_size_bytes=answer.defaultModelSizeInBytes,
        version=answer.runtimeVersion,
        allowed_methods=methods,
        allow_any_method=answer.allowAnyMethod or not methods,
        limit_model_concurrency=answer.limitModelConcurrency,
    )


def _load_error(
    model_id: str, error: grpc.aio.AioRpcError, timeout_s: float, *, connected: bool, is_late: bool
) -> MeshError:
    """Return the mesh's error for a failed loadModel.

    `connected`: the channel to the runtime still stands, so that UNAVAILABLE is the runtime's answer and not a broken connection. An answer with a
    retry hint says that the load was lost, as by a shutdown, which is not the model's failure. `is_late`: the time limit has passed, so that
    DEADLINE_EXCEEDED is ours.
    """
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and is_late:
        details = f"loading took longer than {timeout_s:g} s"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details or code.name, model=model_id)
    is_lost = not connected or any(key == "retry-after-ms" for key, _ in error.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE and is_lost:
        return Unavailable(details or code.name, model=model_id)
    return LoadFailed(f"{code.name}: {details}", model=model_id, lasting=code in _LASTING)


async def look(address: str) -> RuntimeSnapshot | None:
    """Return the state of the runtime at a gRPC address, or None if it does not answer or has no repertory.RuntimeState."""
    async with grpc.aio.insecure_channel(address) as channel:
        return await RuntimeWatch(channel, 0).look()
