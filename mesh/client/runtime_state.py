"""Follows the local runtime's state: repertory.RuntimeState converted to the mesh's types.

A runtime that has no such service ("foreign") is watched by its connection alone: it is ready while that stands and
something answers. One that hangs without dying answers no question in time, and counts as gone.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from common.model_state import CopyState, ModelState, Tier
from mesh.types import FitAnswer, RuntimeSnapshot
from wire.repertory import runtime_pb2 as pb
from wire.repertory.runtime_pb2_grpc import RuntimeStateStub

logger = logging.getLogger(__name__)

_Watch = grpc.aio.UnaryStreamCall[pb.WatchRequest, pb.RuntimeSnapshot]

_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)
ANSWER_S = 10.0  # a runtime that hasn't answered by then hangs
_SILENCE_S = 5.0  # after it, it is asked whether it is still there

_STATES = {number: CopyState[name] for name, number in pb.ModelState.State.items()}
_TIERS = {number: Tier[name] for name, number in pb.ModelState.Tier.items()}
# the message has the schema's names; states and tiers are enums of its own
_SAME = tuple(name for name in ModelState.__struct_fields__ if name not in ("state", "tier"))


class RuntimeWatch:
    """Follows one runtime for ever. `capacity_bytes` is reported while the runtime itself doesn't say."""

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

    async def look(self) -> RuntimeSnapshot | None:
        """What it tells of itself when asked now; None: it doesn't answer, or has no such service."""
        call = self._stub.watch(pb.WatchRequest())
        try:
            message = await self._read(call, self._answer_s)
        except (grpc.aio.AioRpcError, TimeoutError):
            return None
        finally:
            call.cancel()
        return snapshot(message) if message is not None else None

    async def snapshots(self) -> AsyncGenerator[RuntimeSnapshot, None]:
        """Each snapshot as it comes. A broken connection gives one that isn't ready and holds nothing, then what follows the reconnect."""
        failures = 0
        while True:
            call = self._stub.watch(pb.WatchRequest())
            heard = False
            try:
                while (message := await self._read(call, self._silence_s if heard else self._answer_s)) is not None:
                    failures, heard = 0, True
                    yield snapshot(message)
            except TimeoutError:
                call.cancel()
                if heard:
                    continue  # perhaps there was nothing to tell: one that lives answers a new call at once
                logger.warning("the runtime hasn't answered for %g s", self._answer_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    async for foreign in self._connection():
                        yield foreign
                    return
                logger.debug("the runtime's state is not available: %s %s", error.code().name, error.details())
            yield RuntimeSnapshot(self._capacity_bytes)
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1

    async def _read(self, call: _Watch, timeout_s: float) -> pb.RuntimeSnapshot | None:
        """None: the stream has ended. Raises TimeoutError, and the call is then of no more use."""
        async with asyncio.timeout(timeout_s):
            message = await call.read()
        return message if isinstance(message, pb.RuntimeSnapshot) else None

    async def _connection(self) -> AsyncIterator[RuntimeSnapshot]:
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            changed = asyncio.ensure_future(self._channel.wait_for_state_change(state))
            try:
                while not changed.done():
                    # an idle connection says nothing of the runtime behind it
                    if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                        ready = state is grpc.ChannelConnectivity.READY and await self._answers()
                        yield RuntimeSnapshot(self._capacity_bytes, ready=ready, foreign=True)
                    await asyncio.wait((changed,), timeout=self._silence_s)
            finally:
                changed.cancel()
            state = self._channel.get_state(try_to_connect=True)

    async def _answers(self) -> bool:
        """Whatever it answers, it is there."""
        try:
            await HealthStub(self._channel).Check(HealthCheckRequest(), timeout=self._answer_s)
        except grpc.aio.AioRpcError as error:
            return error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        return True


def snapshot(message: pb.RuntimeSnapshot) -> RuntimeSnapshot:
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
        models=tuple(_model(model) for model in message.models),
    )


def _model(model: pb.ModelState) -> ModelState:
    """Return the state in the message. A state of a newer runtime counts as loading, a tier as remote."""
    return ModelState(
        state=_STATES.get(model.state, CopyState.LOADING),
        tier=_TIERS.get(model.tier, Tier.REMOTE),
        **{name: getattr(model, name) for name in _SAME},
    )


def fit_answer(answer: pb.FitResponse) -> FitAnswer:
    return FitAnswer(
        fits=answer.fits,
        reason=answer.reason,
        weight_bytes=answer.weight_bytes,
        kv_bytes_per_token=answer.kv_bytes_per_token,
        min_kv_bytes=answer.min_kv_bytes,
        workspace_bytes=answer.workspace_bytes,
        capacity_bytes=answer.capacity_bytes,
        evicts=tuple(answer.evicts),
        max_model_len=answer.max_model_len,
        quantization=answer.quantization,
        architecture=answer.architecture,
        num_parameters=answer.num_parameters,
        exact=answer.exact,
    )
