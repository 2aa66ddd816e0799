"""Forwards text-generation-inference's HTTP API. The protocol has no field for the model's name, so there are several ways to give one.

In this order: the path below /tgi/NAME, the header mm-model-id, `parameters.adapter_id` or `model` in the body, and the only registered model.
Below a name, `parameters.adapter_id` selects an adapter of that model.
"""

import msgspec
from aiohttp import web

from mesh.access.caller import current_caller
from mesh.api.adapter_choice import AdapterChooser, AdapterFields, choice_of
from mesh.api.addressing import MODEL_HEADER
from mesh.api.http_body import decode
from mesh.api.http_gateway import HttpGateway
from mesh.errors import InvalidRequest
from mesh.registry.registry import NAMES_IN_A_MESSAGE, Registry

_NAMED = "/tgi/{name:.+}"
_OPENAI = ("/v1/chat/completions", "/v1/completions")


class _Body(msgspec.Struct, frozen=True):
    """The fields that the mesh reads."""

    model: str | None = None
    stream: bool | None = None
    parameters: AdapterFields | None = None


class TgiRoutes:
    def __init__(self, gateway: HttpGateway, registry: Registry, adapters: AdapterChooser) -> None:
        self._gateway = gateway
        self._adapters = adapters
        self._registry = registry

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes. Those with more after the name come first, since a name may contain slashes."""
        for path in (*_OPENAI, "/tokenize", "/generate"):
            router.add_post(_NAMED + path, self._post)
        router.add_post(f"{_NAMED}/generate_stream", self._post_stream)
        router.add_get(f"{_NAMED}/info", self._info)
        router.add_get(f"{_NAMED}/health", self._health)
        router.add_post(f"{_NAMED}/", self._post)  # a client's base URL may end in a slash
        router.add_post(_NAMED, self._post)
        router.add_post("/generate", self._post)
        router.add_post("/generate_stream", self._post_stream)
        router.add_get("/info", self._info)
        router.add_post("/", self._post)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        return await self._forward(request, always_streams=False)

    async def _post_stream(self, request: web.Request) -> web.StreamResponse:
        return await self._forward(request, always_streams=True)

    async def _forward(self, request: web.Request, *, always_streams: bool) -> web.StreamResponse:
        body = await self._gateway.read(request)
        asked = decode(body, _Body)
        base, parameters = self._addressed(request), asked.parameters
        name = await self._adapters.choose(base, lambda: choice_of(parameters) if parameters else None)
        name = name or asked.model or self._only_name()
        streams = always_streams or (asked.stream is True and not request.path.endswith("/generate"))
        return await self._gateway.forward(request, body, name, wants_events=streams)

    async def _info(self, request: web.Request) -> web.StreamResponse:
        return await self._gateway.forward(request, b"", self._name(request, request.query.get("model", "")))

    async def _health(self, request: web.Request) -> web.Response:
        """Answer 200 for a registered model, without loading it. Raises NotFound."""
        await self._registry.resolve_known(request.match_info["name"], virtual=False)
        return web.Response()

    def _name(self, request: web.Request, asked: str) -> str:
        return self._addressed(request) or asked or self._only_name()

    def _addressed(self, request: web.Request) -> str | None:
        """Return the name in the path or the header; None if there is none."""
        return request.match_info.get("name") or request.headers.get(MODEL_HEADER)

    def _only_name(self) -> str:
        named = [each for each in self._registry.named() if current_caller().may_use(each.name)]
        if len({each.model_id for each in named}) == 1:
            return named[0].name
        names = [each.name for each in named]
        more = f" and {len(names) - NAMES_IN_A_MESSAGE} more" if len(names) > NAMES_IN_A_MESSAGE else ""
        shown = ", ".join(names[:NAMES_IN_A_MESSAGE]) + more or "none"
        raise InvalidRequest(
            f"name the model: as /tgi/NAME before the path, or as `model` in the body; registered models: {shown}"
        )
