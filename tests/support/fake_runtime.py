"""A serving runtime that loads nothing: real gRPC and HTTP servers on unix sockets, with faults, delays and streams to be switched.

Speaks mmesh.ModelRuntime, repertory.RuntimeState (unless foreign), fmaas-like and arbitrary gRPC methods as bytes, and OpenAI-like HTTP."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from aiohttp import web
from grpc_reflection.v1alpha import reflection

from tests.support.fake_spi import FakeSpi, FakeState
from wire.mmesh.model_runtime_pb2_grpc import add_ModelRuntimeServicer_to_server
from wire.repertory import runtime_pb2 as state_pb
from wire.repertory.runtime_pb2_grpc import add_RuntimeStateServicer_to_server

MB = 1_000_000


STATE_SERVICE = state_pb.DESCRIPTOR.services_by_name["RuntimeState"].full_name


@dataclass
class Switches:
    """What is to go wrong or slowly. Sizes by model path; `fail` maps a path to the cause of its failure."""

    capacity_bytes: int = 100 * MB
    size_bytes: dict[str, int] = field(default_factory=dict)
    default_size_bytes: int = 10 * MB
    predicted_bytes: int = 0  # not 0: what is predicted, whatever the size
    overcommits: bool = False
    hidden_bytes: int = 0  # memory that something else than the models uses
    load_s: float = 0.0
    load_gate: asyncio.Event | None = None
    is_reading: bool = False  # loads report that they read weights, not that they pull files
    fail: dict[str, str] = field(default_factory=dict)
    crash: set[str] = field(default_factory=set)  # paths whose load ends as INTERNAL
    invalid: dict[str, str] = field(default_factory=dict)  # by path: why `fit` refuses it as an invalid argument
    unreadable: dict[str, str] = field(default_factory=dict)  # by path: why `fit` finds that it cannot be loaded
    unpacking: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path: fields of the answer of `fit`
    loading_concurrency: int = 4
    unavailable: int = 0  # so many inference calls answer UNAVAILABLE / 503
    lost_statuses: int = 0  # so many gRPC calls end as grpc.aio shows those whose status it has lost
    engine_ready: bool = True  # if not, they all do; reported in the next snapshot, like everything else
    full_disk: bool = False
    quarantined: set[str] = field(default_factory=set)
    progress: float = 0.0
    sequences: int = 0  # that every loaded model reports as running
    content_type: str = "text/event-stream"  # of HTTP streams
    busy_s: float = 0.0  # what every loaded model reports
    context: tuple[int, int] = (4096, 4096)  # of every loaded model: what it has, and what was asked for
    text_errors: bool = False  # HTTP errors are {"error": text}, and a header marks a model that is not loaded
    chunk_s: float = 0.0
    queued: int = 0  # requests that each model reports as waiting
    mute: bool = False  # inference calls hang, and the state is still reported
    frozen: bool = False  # as after SIGSTOP: nothing answers, not even the state
    answer_s: float = 0.0  # before each inference answer
    end_s: float = 0.0  # between a stream's last event and its end
    max_message_bytes: int = 16 * 1024 * 1024
    max_concurrency: int = 0  # not 0: the mesh is to keep to it
    methods: dict[str, tuple[int, ...]] = field(default_factory=dict)


class FakeRuntime:
    def __init__(self, directory: Path, *, foreign: bool = False, switches: Switches | None = None) -> None:
        self.switches = switches or Switches()
        self.grpc_address = f"unix:{directory}/runtime.sock"
        self.http_address = f"unix:{directory}/http.sock"
        self.foreign = foreign
        self.loaded: dict[str, str] = {}
        self.loading: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.refusals = 0
        self.running = 0
        self.computing: Counter[str] = Counter()  # requests that wait for `answer_s`
        self.most_running = 0
        self.log: list[tuple[str, str]] = []
        self.cancelled: list[str] = []
        self.metadata: list[tuple[tuple[str, str | bytes], ...]] = []
        self.deadlines: list[float | None] = []
        self.bodies: list[dict[str, Any]] = []
        self.raw_bodies: list[bytes] = []
        self.openapi: dict[str, Any] | None = None
        self.fits: list[state_pb.FitRequest] = []
        self.headers: list[dict[str, str]] = []
        self.response_headers: dict[str, str] = {}
        self.response_trailers: dict[str, str] = {}  # of gRPC calls
        self.files: list[state_pb.CachedFiles] = []
        self.changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        size = self.switches.max_message_bytes
        options = (("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size))
        self._server = grpc.aio.server(options=options)
        add_ModelRuntimeServicer_to_server(FakeSpi(self), self._server)
        if not self.foreign:
            add_RuntimeStateServicer_to_server(FakeState(self), self._server)
            reflection.enable_server_reflection((STATE_SERVICE, reflection.SERVICE_NAME), self._server)
        self._server.add_generic_rpc_handlers((_AnyMethod(self),))
        self._server.add_insecure_port(self.grpc_address)
        await self._server.start()
        app = web.Application()
        app.on_response_prepare.append(self._add_headers)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/openapi.json", self._openapi)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, self.http_address.removeprefix("unix:")).start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
        if self._runner is not None:
            await self._runner.cleanup()

    async def restart_empty(self) -> None:
        """As a process that died and came back."""
        await self.stop()
        self.loaded.clear()
        self.loading.clear()
        await self.start()

    def drop(self, model_id: str) -> None:
        """Lose a model without telling anybody."""
        self.loaded.pop(model_id, None)
        self.tell()

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def refuses(self) -> bool:
        if self.switches.unavailable:
            self.switches.unavailable -= 1
        elif self.switches.engine_ready:
            return False
        self.refusals += 1
        return True

    def freeze(self) -> None:
        """Answer nothing from now on, as after SIGSTOP."""
        self.switches.frozen = True

    def thaw(self) -> None:
        self.switches.frozen = False
        self.tell()

    async def while_frozen(self) -> None:
        while self.switches.frozen:
            await self.changed.wait()

    async def before_answer(self, model_id: str) -> None:
        """Wait as long as the switches delay inference."""
        await self.while_frozen()
        while self.switches.mute:
            await self.changed.wait()
        self.computing[model_id] += 1
        try:
            await asyncio.sleep(self.switches.answer_s)
        finally:
            self.computing[model_id] -= 1

    def not_here(self) -> dict[str, str]:
        """The header by which our runtime says that another copy should answer; a foreign one has no such."""
        return {} if self.foreign else {"x-repertory-not-here": "1"}

    def used_bytes(self) -> int:
        return sum(self.size_of(path) for path in self.loaded.values())

    def size_of(self, path: str) -> int:
        return self.switches.size_bytes.get(path, self.switches.default_size_bytes)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text="# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n")

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.json_response(self.openapi, status=200 if self.openapi is not None else 404)

    async def _add_headers(self, _: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(self.response_headers)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.raw_bodies.append(raw)
        body = json.loads(raw[: int(request.headers.get("Inference-Header-Content-Length", len(raw)))] or b"{}")
        model_id = request.headers.get("mm-model-id", "")
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.refuses():
            return web.json_response(
                {"error": {"message": "restarting", "type": "unavailable_error"}}, status=503, headers=self.not_here()
            )
        if model_id not in self.loaded and self.switches.text_errors:
            return web.json_response({"error": f"{model_id} is not loaded here"}, status=404, headers=self.not_here())
        if model_id not in self.loaded:
            return web.json_response(
                {"error": {"message": f"{model_id} is not loaded here", "code": "model_not_found"}},
                status=404,
                headers=self.not_here(),
            )
        if request.path == "/v1/nothing":
            return web.json_response({"error": {"message": "no such path", "code": None}}, status=404)
        self.calls[model_id] += 1
        await self.before_answer(model_id)
        if not body.get("stream"):
            return web.json_response(
                {"answer": model_id, "path": request.path, "id": request.headers.get("X-Request-Id", "")}
            )
        response = web.StreamResponse(headers={"Content-Type": self.switches.content_type})
        await response.prepare(request)
        try:
            for index in range(int(body.get("chunks", 3))):
                await asyncio.sleep(self.switches.chunk_s)
                await response.write(f"data: {json.dumps({'model': model_id, 'n': index})}\n\n".encode())
                if body.get("break_at") == index:
                    request.transport.abort()  # type: ignore[union-attr]
                    return response
            await response.write(b"data: [DONE]\n\n")
            await asyncio.sleep(self.switches.end_s)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.append(model_id)
            raise
        return response


class _AnyMethod(grpc.GenericRpcHandler):
    """/test.Any/Echo: each message comes back; First: only the first one does, and the call ends; Slow: never ends; Big: N bytes; Count, or any GenerateStream: N messages; Fail: the status named
    in the message; else as Echo."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method

        async def serve(_: AsyncIterator[bytes], context: Any) -> None:
            await self._serve(method, context)

        return grpc.stream_stream_rpc_method_handler(serve)

    async def _serve(self, method: str, context: Any) -> None:
        runtime = self._runtime
        metadata = tuple(context.invocation_metadata())
        runtime.metadata.append(metadata)
        runtime.deadlines.append(context.time_remaining())
        model_id = next((value for key, value in metadata if key == "mm-model-id"), "")
        if runtime.switches.lost_statuses:
            runtime.switches.lost_statuses -= 1
            await context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core")
        if runtime.refuses():
            await context.abort(grpc.StatusCode.UNAVAILABLE, "restarting", tuple(runtime.not_here().items()))
        if model_id not in runtime.loaded:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"{model_id} is not loaded here", tuple(runtime.not_here().items())
            )
        runtime.calls[model_id] += 1
        runtime.running += 1
        runtime.most_running = max(runtime.most_running, runtime.running)
        try:
            await runtime.before_answer(model_id)
            await self._answer(method.rpartition("/")[2], context)
        except asyncio.CancelledError:
            runtime.cancelled.append(model_id)
            raise
        finally:
            runtime.running -= 1

    async def _answer(self, verb: str, context: Any) -> None:
        await context.send_initial_metadata((("answered-by", "fake"),))
        while (message := await context.read()) is not grpc.aio.EOF:
            if verb == "Fail":
                await context.abort(
                    grpc.StatusCode[message.decode()], "as asked", (("why", "because"), ("why-bin", b"\x00\xff"))
                )
            if verb == "First":
                await context.write(message)
                return
            if verb == "Slow":
                await context.write(b"first")
                await asyncio.sleep(3600)
            if verb == "Big":
                await context.write(b"x" * int(message))
            elif verb == "Count" or (verb == "GenerateStream" and message.isdigit()):
                for index in range(int(message)):
                    await asyncio.sleep(self._runtime.switches.chunk_s)
                    await context.write(str(index).encode())
            else:
                await context.write(message)
        added = tuple(self._runtime.response_trailers.items())
        context.set_trailing_metadata((("trailer", "kept"), ("trailer-bin", b"\x01\xfe"), *added))
