"""Following a runtime: one that falls silent, one that returns, and one that answers methods which it does not have."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthServicer, add_HealthServicer_to_server
from grpc_reflection.v1alpha import reflection

from mesh.client.runtime_state import RuntimeWatch
from wire.repertory import runtime_pb2 as pb
from wire.repertory.runtime_pb2_grpc import RuntimeStateServicer, add_RuntimeStateServicer_to_server


class Moody(RuntimeStateServicer, HealthServicer):  # type: ignore[misc]
    """Tells its state once a call and then nothing more; while it `hangs`, not even that."""

    def __init__(self) -> None:
        self.calls = 0
        self.hangs = False

    async def watch(self, request: pb.WatchRequest, context: Any) -> AsyncIterator[pb.RuntimeSnapshot]:
        self.calls += 1
        if not self.hangs:
            yield pb.RuntimeSnapshot(capacity_bytes=self.calls, engine_state=pb.ENGINE_READY)
        await asyncio.sleep(3600)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        await asyncio.sleep(3600 if self.hangs else 0)
        return health_pb2.HealthCheckResponse()


async def serve(tmp_path: Path, moody: Moody, *, foreign: bool) -> tuple[grpc.aio.Server, RuntimeWatch]:
    server = grpc.aio.server()
    if not foreign:
        add_RuntimeStateServicer_to_server(moody, server)
        service = pb.DESCRIPTOR.services_by_name["RuntimeState"].full_name
        reflection.enable_server_reflection((service, reflection.SERVICE_NAME), server)
    add_HealthServicer_to_server(moody, server)
    address = f"unix:{tmp_path}/runtime.sock"
    server.add_insecure_port(address)
    await server.start()
    return server, RuntimeWatch(grpc.aio.insecure_channel(address), 7, silence_s=0.1, answer_s=0.3)


async def test_runtime_state_survives_silence_but_not_a_missing_answer(tmp_path: Path) -> None:
    moody = Moody()
    server, watch = await serve(tmp_path, moody, foreign=False)
    snapshots = watch.snapshots()
    seen = [await anext(snapshots) for _ in range(3)]
    assert [(one.ready, one.capacity_bytes) for one in seen] == [(True, 1), (True, 2), (True, 3)]
    moody.hangs = True
    assert await watch.look() is None
    assert not (await anext(snapshots)).ready
    moody.hangs = False
    assert (await anext(snapshots)).ready
    assert (await watch.look() or seen[0]).capacity_bytes == moody.calls
    await snapshots.aclose()
    await server.stop(0)


async def test_runtime_state_foreign_runtime_without_answers_is_gone(tmp_path: Path) -> None:
    moody = Moody()
    server, watch = await serve(tmp_path, moody, foreign=True)
    snapshots = watch.snapshots()
    while not (await anext(snapshots)).ready:
        pass
    moody.hangs = True
    assert await watch.look() is None
    while (told := await anext(snapshots)).ready:
        pass
    assert told.foreign
    moody.hangs = False
    while not (await anext(snapshots)).ready:
        pass
    await snapshots.aclose()
    await server.stop(0)


class CatchAll(grpc.GenericRpcHandler):
    """Answers every method, as a runtime does whose framework forwards unknown methods to one handler."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        async def serve(_: AsyncIterator[bytes], context: Any) -> None:
            await self._answer(context)

        return grpc.stream_stream_rpc_method_handler(serve)


async def echo(context: Any) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


async def end_without_an_answer(context: Any) -> None:
    await context.read()


async def answer_garbage(context: Any) -> None:
    await context.write(b"\xff\xff\xff")


def refuse_with(code: grpc.StatusCode) -> Callable[[Any], Any]:
    async def refuse(context: Any) -> None:
        await context.abort(code, "as always")

    return refuse


@pytest.mark.parametrize(
    "answer",
    [
        echo,
        end_without_an_answer,
        answer_garbage,
        *(refuse_with(code) for code in grpc.StatusCode if code is not grpc.StatusCode.OK),
    ],
)
async def test_runtime_state_catch_all_runtime_is_foreign(answer: Callable[[Any], Any], tmp_path: Path) -> None:
    server = grpc.aio.server()
    add_HealthServicer_to_server(Moody(), server)
    server.add_generic_rpc_handlers((CatchAll(answer),))
    server.add_insecure_port(f"unix:{tmp_path}/runtime.sock")
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/runtime.sock") as channel:
        snapshots = RuntimeWatch(channel, 7).snapshots()
        async with asyncio.timeout(5):
            while not (told := await anext(snapshots)).ready:
                pass
        assert told.foreign
        assert told.capacity_bytes == 7
        await snapshots.aclose()
    await server.stop(0)
