"""A serving runtime without models for the replay of ModelMesh's recording: `python -m tests.support.modelmesh_runtime DIRECTORY CONCURRENCY`.

It serves mmesh.ModelRuntime and any other method on DIRECTORY/runtime.sock. The query of a model's path says how the model behaves:
size and predicted (megabytes), load and unload (seconds), fail (CODE:TEXT). The last part of a method's name says what a call answers:
Fail (the status that the message names), Slow (after as many seconds as the message says), Count (calls of the model so far), Headers (the
names of the metadata), anything else (the message itself). A line `purge` to DIRECTORY/control.sock unloads all models without a word to
the mesh; every line is answered with the names of the loaded models.
"""

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

import grpc
import grpc.aio

from wire.mmesh import model_runtime_pb2 as pb
from wire.mmesh.model_runtime_pb2_grpc import ModelRuntimeServicer, add_ModelRuntimeServicer_to_server

MEGABYTE = 1_000_000
CAPACITY_BYTES = 60 * MEGABYTE

Context = grpc.aio.ServicerContext[Any, Any]


def behaviour(path: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(path).query))


async def end_as(context: Context, order: str) -> NoReturn:
    code, _, text = order.partition(":")
    await context.abort(grpc.StatusCode[code], text)


class RecordedRuntime(ModelRuntimeServicer, grpc.GenericRpcHandler):
    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._calls: Counter[str] = Counter()
        self.loaded: dict[str, dict[str, str]] = {}

    async def runtimeStatus(self, request: pb.RuntimeStatusRequest, context: Context) -> pb.RuntimeStatusResponse:
        self.loaded.clear()
        return pb.RuntimeStatusResponse(
            status=pb.RuntimeStatusResponse.READY,
            capacityInBytes=CAPACITY_BYTES,
            maxLoadingConcurrency=self._concurrency,
            modelLoadingTimeoutMs=20_000,
            defaultModelSizeInBytes=MEGABYTE,
            runtimeVersion="recorded",
            allowAnyMethod=True,
        )

    async def loadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        orders = behaviour(request.modelPath)
        await asyncio.sleep(float(orders.get("load", "0")))
        if "fail" in orders:
            await end_as(context, orders["fail"])
        self.loaded[request.modelId] = orders
        return pb.LoadModelResponse(sizeInBytes=_size_bytes(orders, "size"))

    async def unloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        await asyncio.sleep(float(self.loaded.get(request.modelId, {}).get("unload", "0")))
        self.loaded.pop(request.modelId, None)
        return pb.UnloadModelResponse()

    async def predictModelSize(
        self, request: pb.PredictModelSizeRequest, context: Context
    ) -> pb.PredictModelSizeResponse:
        orders = behaviour(request.modelPath)
        return pb.PredictModelSizeResponse(
            sizeInBytes=_size_bytes(orders, "predicted" if "predicted" in orders else "size")
        )

    async def modelSize(self, request: pb.ModelSizeRequest, context: Context) -> pb.ModelSizeResponse:
        return pb.ModelSizeResponse(sizeInBytes=_size_bytes(self.loaded[request.modelId], "size"))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        if handler_call_details.method.startswith(("/mmesh.ModelRuntime/", "/repertory.", "/grpc.")):
            return None
        kind = handler_call_details.method.rpartition("/")[2]

        async def answer(message: bytes, context: Context) -> bytes:
            return await self._answer(kind, message, context)

        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(answer)
        return handler

    async def _answer(self, kind: str, message: bytes, context: Context) -> bytes:
        names = dict(context.invocation_metadata() or ())
        model_id = str(names.get("mm-model-id", ""))
        if model_id not in self.loaded:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{model_id} is not loaded")
        self._calls[model_id] += 1
        if kind == "Fail":
            await end_as(context, message.decode())
        if kind == "Slow":
            await asyncio.sleep(float(message))
        if kind == "Count":
            return str(self._calls[model_id]).encode()
        if kind == "Headers":
            return json.dumps(sorted(name for name in names if not name.startswith(("grpc-", "user-agent")))).encode()
        return message

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readline()).strip() == b"purge":
            self.loaded.clear()
        writer.write(json.dumps(sorted(self.loaded)).encode() + b"\n")
        writer.close()


def _size_bytes(orders: dict[str, str], name: str) -> int:
    return int(float(orders.get(name, "1")) * MEGABYTE)


async def serve(directory: Path, concurrency: int) -> None:
    runtime = RecordedRuntime(concurrency)
    server = grpc.aio.server()
    add_ModelRuntimeServicer_to_server(runtime, server)
    server.add_generic_rpc_handlers((runtime,))
    server.add_insecure_port(f"unix:{directory}/runtime.sock")
    await server.start()
    async with await asyncio.start_unix_server(runtime.control, str(directory / "control.sock")):
        await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]).resolve(), int(sys.argv[2])))
