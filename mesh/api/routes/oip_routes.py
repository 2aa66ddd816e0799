"""The Open Inference Protocol's REST API: health and readiness are answered here, inference is forwarded to a copy of the model.

Forwarding a readiness probe would load the model, so a monitor would keep every model from being evicted.
"""

from collections.abc import Callable

import msgspec
from aiohttp import web

from mesh.access.caller import current_caller
from mesh.api.http_gateway import HttpGateway
from mesh.errors import LoadFailed, NotSupported
from mesh.placement.placement import Placement
from mesh.registry.registry import Registry
from mesh.types import ModelStatus, ModelStatuses

_MODEL = "/v2/models/{name:.+}"
_VERSIONED = "/v2/models/{name:.+}/versions/{version}"
_STREAM = "generate_stream"
_STATES = {ModelStatus.LOADED: "READY", ModelStatus.LOADING: "LOADING"}


class IndexEntry(msgspec.Struct, frozen=True):
    """A model in Triton's repository index. `state`: READY, LOADING or UNAVAILABLE, with the reason of a failed load."""

    name: str
    version: str
    state: str
    reason: str


class OipRoutes:
    def __init__(
        self,
        gateway: HttpGateway,
        registry: Registry,
        states: ModelStatuses,
        placement: Placement,
        *,
        is_ready: Callable[[], bool],
        version: str,
    ) -> None:
        self._gateway = gateway
        self._registry = registry
        self._states = states
        self._placement = placement
        self._is_ready = is_ready
        self._version = version

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes. Those with a suffix after the name come first, since a name may contain slashes."""
        router.add_get("/v2", self._server_metadata)
        router.add_get("/v2/health/live", self._live)
        router.add_get("/v2/health/ready", self._ready)
        router.add_post("/v2/repository/index", self._index)
        router.add_post("/v2/repository/models/{name:.+}/load", self._load)
        router.add_post("/v2/repository/models/{name:.+}/unload", self._unload)
        for path in (_VERSIONED, _MODEL):
            router.add_get(path + "/ready", self._model_ready)
            for verb in ("infer", "generate", _STREAM):
                router.add_post(f"{path}/{verb}", self._forward)
            for verb in ("config", "stats", "trace/setting"):
                router.add_get(f"{path}/{verb}", self._refuse)
        router.add_get(_VERSIONED, self._forward)
        router.add_get(_MODEL, self._forward)

    async def _server_metadata(self, _: web.Request) -> web.Response:
        extensions = ["binary_tensor_data", "generate", "model_repository"]
        return web.json_response({"name": "repertory", "version": self._version, "extensions": extensions})

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def _ready(self, _: web.Request) -> web.Response:
        ready = self._is_ready()
        return web.json_response({"ready": ready}, status=200 if ready else 503)

    async def _model_ready(self, request: web.Request) -> web.Response:
        """Report true for a model that is loaded or that a request would load. Raises NotFound."""
        name = request.match_info["name"]
        model_id = await self._registry.resolve_known(name, virtual=False)
        ready = self._states.status(model_id).status is not ModelStatus.LOADING_FAILED
        return web.json_response({"name": name, "ready": ready}, status=200 if ready else 503)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        streams = request.path.endswith(f"/{_STREAM}")
        body = await self._gateway.read(request)
        return await self._gateway.forward(request, body, name, wants_events=streams)

    async def _index(self, _: web.Request) -> web.Response:
        entries: list[IndexEntry] = []
        for named in self._registry.named():
            if not current_caller().may_use(named.name):
                continue
            status = self._states.status(named.model_id)
            state = _STATES.get(status.status, "UNAVAILABLE")
            entries.append(IndexEntry(named.name, "1", state, status.errors[0] if status.errors else ""))
        return web.Response(body=msgspec.json.encode(entries), content_type="application/json")

    async def _load(self, request: web.Request) -> web.Response:
        """Load the model and answer when it is loaded. Raises NotFound, LoadFailed."""
        name = request.match_info["name"]
        model_id = await self._registry.resolve_fresh(name)
        status = await self._placement.ensure_loaded(model_id, wait=True, retry_failed=True)
        if status.status is ModelStatus.LOADING_FAILED:
            raise LoadFailed(status.errors[0] if status.errors else "the runtime gave no reason", model=name)
        return web.json_response({})

    async def _unload(self, request: web.Request) -> web.Response:
        """Unload all copies, then answer. Raises NotFound."""
        await self._placement.unload(await self._registry.resolve_fresh(request.match_info["name"]))
        return web.json_response({})

    async def _refuse(self, request: web.Request) -> web.Response:
        raise NotSupported(f"GET {request.path} is not supported: /metrics has the statistics of all models")
