"""Watches the local runtime's state: repertory.RuntimeState converted to the mesh's types.

A runtime whose reflection does not list that service ("foreign") is watched by its connection and its health check alone, because
a catch-all handler may answer any method with anything. A runtime that answers nothing in time counts as gone.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from common.model_fit import ModelFit
from common.model_state import CopyState, DeviceFigures, ModelState, Tier
from mesh.types import RuntimeSnapshot
from wire.repertory import runtime_pb2 as pb
from wire.repertory.runtime_pb2_grpc import RuntimeStateStub

logger = logging.getLogger(__name__)

_Watch = grpc.aio.UnaryStreamCall[pb.WatchRequest, pb.RuntimeSnapshot]

_SERVICE = pb.DESCRIPTOR.services_by_name["RuntimeState"].full_name
_REFUSALS = 2  # the first may come from a connection that is breaking
_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)
ANSWER_S = 2.5  # a runtime without an answer by then hangs
_SILENCE_S = 2.5  # a new call is made after this long without a message; the contract says that one comes every 2 s

_STATES = {number: CopyState[name] for name, number in pb.ModelState.State.items()}
_TIERS = {number: Tier[name] for name, number in pb.ModelState.Tier.items()}
# The message has the schema's names, except for its own enums of states and tiers.
_SAME = tuple(name for name in ModelState.__struct_fields__ if name not in ("state", "tier"))


class RuntimeWatch:
    """Watches one runtime. `capacity_bytes` is reported while the runtime itself reports none."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        capacity_bytes: int,
        *,
        silence_s: float = _SILENCE_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._channel = channel
        self._stub = RuntimeStateStub(channel)
        self._capacity_bytes = capacity_bytes
        self._silence_s = silence_s
        self._answer_s = answer_s
        self._reader = SnapshotReader()

    async def look(self) -> RuntimeSnapshot | None:
        """Return the current snapshot; None if the runtime does not answer or has no such service."""
        call = self._stub.watch(pb.WatchRequest())
        try:
            message = await self._read(call, self._answer_s)
        except (grpc.aio.AioRpcError, TimeoutError):
            return None
        finally:
            call.cancel()
        return self._reader.read(message) if message is not None else None

    async def snapshots(self) -> AsyncGenerator[RuntimeSnapshot, None]:
        """Yield each snapshot. A broken connection yields an empty one that is not ready, then those after the reconnect."""
        failures, is_known = 0, False
        while True:
            if not is_known and await self._is_foreign():
                async for foreign in self._connection():
                    yield foreign
                return
            call = self._stub.watch(pb.WatchRequest())
            heard = False
            try:
                while (message := await self._read(call, self._silence_s if heard else self._answer_s)) is not None:
                    failures, heard, is_known = 0, True, True
                    yield self._reader.read(message)
            except TimeoutError:
                call.cancel()
                if heard:
                    continue  # Perhaps nothing changed: a live runtime answers a new call at once.
                logger.warning("the runtime has not answered for %g s", self._answer_s)
            except grpc.aio.AioRpcError as error:
                is_known = is_known and error.code() is not grpc.StatusCode.UNIMPLEMENTED
                logger.debug("the runtime's state is not available: %s %s", error.code().name, error.details())
            yield RuntimeSnapshot(self._capacity_bytes)
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1

    async def _read(self, call: _Watch, timeout_s: float) -> pb.RuntimeSnapshot | None:
        """Return the next message; None at the end of the stream. After a TimeoutError the call must not be used again."""
        async with asyncio.timeout(timeout_s):
            message = await call.read()
        return message if isinstance(message, pb.RuntimeSnapshot) else None

    async def _is_foreign(self) -> bool:
        """Ask the runtime for its services. False if it offers repertory.RuntimeState, or if it cannot be reached."""
        for _ in range(_REFUSALS):
            try:
                async with asyncio.timeout(self._answer_s):
                    return _SERVICE not in await self._services()
            except TimeoutError:
                return False
            except grpc.aio.AioRpcError:
                if self._channel.get_state() is not grpc.ChannelConnectivity.READY:
                    return False
        return True

    async def _services(self) -> set[str]:
        """Return what its reflection lists; nothing if a catch-all handler answers instead. Raises AioRpcError."""
        asked = iter((ServerReflectionRequest(list_services=""),))
        call = ServerReflectionStub(self._channel).ServerReflectionInfo(asked)
        try:
            answer = await call.read()
        finally:
            call.cancel()
        if not isinstance(answer, ServerReflectionResponse):
            return set()
        return {service.name for service in answer.list_services_response.service}

    async def _connection(self) -> AsyncIterator[RuntimeSnapshot]:
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            changed = asyncio.ensure_future(self._channel.wait_for_state_change(state))
            try:
                while not changed.done():
                    # An idle connection proves nothing about the runtime.
                    if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                        ready = state is grpc.ChannelConnectivity.READY and await self._answers()
                        yield RuntimeSnapshot(self._capacity_bytes, ready=ready, foreign=True)
                    await asyncio.wait((changed,), timeout=self._silence_s)
            finally:
                changed.cancel()
            state = self._channel.get_state(try_to_connect=True)

    async def _answers(self) -> bool:
        """Return whether the runtime answers a health check, with any status."""
        try:
            await HealthStub(self._channel).Check(HealthCheckRequest(), timeout=self._answer_s)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        return True


class SnapshotReader:
    """Converts snapshots. The states of models that do not change stay the same objects: each snapshot repeats those of all models."""

    def __init__(self) -> None:
        self._known: dict[bytes, ModelState] = {}  # by the message of each

    def read(self, message: pb.RuntimeSnapshot) -> RuntimeSnapshot:
        known, self._known = self._known, {}
        for model in message.models:
            content = model.SerializeToString(deterministic=True)
            self._known[content] = known.get(content) or _model(model)
        return RuntimeSnapshot(
            capacity_bytes=message.capacity_bytes,
            ready=message.engine_state == pb.ENGINE_READY,
            device_budget_bytes=message.device_budget_bytes,
            device_used_bytes=message.device_used_bytes,
            host_budget_bytes=message.host_budget_bytes,
            host_used_bytes=message.host_used_bytes,
            engine_state=pb.EngineState.Name(message.engine_state).removeprefix("ENGINE_").lower(),
            engine_restarts=message.engine_restarts,
            device_name=message.device_name,
            device_reserve_bytes=message.device_reserve_bytes,
            models=tuple(self._known.values()),
            devices=tuple(
                DeviceFigures(
                    name=device.name, group=device.group, budget_bytes=device.budget_bytes, used_bytes=device.used_bytes
                )
                for device in message.devices
            ),
        )


def _model(model: pb.ModelState) -> ModelState:
    """Return the state in the message. A state of a newer runtime counts as loading, a tier as remote."""
    return ModelState(
        state=_STATES.get(model.state, CopyState.LOADING),
        tier=_TIERS.get(model.tier, Tier.REMOTE),
        **{name: getattr(model, name) for name in _SAME},
    )


def fit_answer(answer: pb.FitResponse) -> ModelFit:
    """Return what a runtime predicts. An older runtime does not report `num_devices`."""
    fields = {name: getattr(answer, name) for name in ModelFit.__struct_fields__}
    return ModelFit(**{**fields, "evicts": tuple(answer.evicts), "num_devices": answer.num_devices or 1})
