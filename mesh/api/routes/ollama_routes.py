"""Ollama's API: chats, completions and embeddings are forwarded to a copy of the model, lists of models are answered here."""

import re
from typing import Any

import msgspec
from aiohttp import web

from common.version import package_version
from mesh.access.caller import current_caller
from mesh.api.http_body import decode
from mesh.api.http_gateway import HttpGateway
from mesh.api.model_view import ModelViews
from mesh.api.routes.ollama_models import is_loaded, running, shown, tag
from mesh.errors import InvalidRequest, NotFound, NotSupported, PermissionDenied
from mesh.placement.placement import Placement
from mesh.registry.registry import Registry

# The version of Ollama whose API is followed. Clients compare it, and refuse servers that are too old for them.
API_VERSION = "0.14.0"
_TAG = ":latest"
_NO_TIME = re.compile(r"0+(\.0+)?(ms|s|m|h)?")  # a duration of 0, as a number of seconds or in Go's form


class _Body(msgspec.Struct, frozen=True):
    """The fields that the mesh reads. `name` is an older name of `model`."""

    model: str = ""
    name: str = ""
    prompt: str | None = None
    messages: list[msgspec.Raw] | None = None
    keep_alive: Any = None

    @property
    def only_unloads(self) -> bool:
        """Whether the request asks for nothing but that the model be unloaded."""
        return not self.prompt and not self.messages and _NO_TIME.fullmatch(str(self.keep_alive)) is not None


class OllamaRoutes:
    def __init__(self, gateway: HttpGateway, registry: Registry, placement: Placement, views: ModelViews) -> None:
        self._gateway = gateway
        self._registry = registry
        self._placement = placement
        self._views = views

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/version", self._version)
        router.add_get("/api/tags", self._tags)
        router.add_get("/api/ps", self._running)
        router.add_post("/api/show", self._show)
        router.add_post("/api/chat", self._chat)
        router.add_post("/api/generate", self._generate)
        for path in ("/api/embed", "/api/embeddings"):
            router.add_post(path, self._embed)
        for path in ("/api/pull", "/api/push", "/api/create", "/api/copy"):
            router.add_post(path, self._refuse_registration)
        router.add_delete("/api/delete", self._refuse_registration)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": API_VERSION, "server": f"repertory/{package_version()}"})

    async def _tags(self, _: web.Request) -> web.Response:
        return _json({"models": [tag(model) for model in self._views.all()]})

    async def _running(self, _: web.Request) -> web.Response:
        return _json({"models": [running(model) for model in self._views.all() if is_loaded(model)]})

    async def _show(self, request: web.Request) -> web.StreamResponse:
        """Describe a model. Only a copy's runtime knows what the model can do; this does not load it."""
        body = await self._gateway.read(request)
        asked = decode(body, _Body)
        name = await self._name(asked.model or asked.name)
        model = await self._views.one(name)
        return await self._gateway.forward(request, body, name) if is_loaded(model) else _json(shown(model))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        content = {"message": {"role": "assistant", "content": ""}}
        return await self._answer(request, content)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, {"response": ""})

    async def _answer(self, request: web.Request, empty: dict[str, Any]) -> web.StreamResponse:
        """Forward the request, or unload the model if that is all it asks for; `empty` is the content of the answer to that."""
        body = await self._gateway.read(request)
        asked = decode(body, _Body)
        name = await self._name(asked.model)
        if not asked.only_unloads:
            return await self._gateway.forward(request, body, name)
        if not (caller := current_caller()).may_manage:
            raise PermissionDenied(
                f"key {caller.name} may not unload models: it lacks the scope management", model=name
            )
        await self._placement.unload(await self._registry.resolve_fresh(name))
        return _json({"model": asked.model, **empty, "done": True, "done_reason": "unload"})

    async def _name(self, asked: str) -> str:
        """Return the registered name. Ollama's clients add a tag to a name that has none. Raises InvalidRequest, NotFound."""
        if not asked:
            raise InvalidRequest("model is missing: it names the model to use")
        try:
            await self._registry.resolve_known(asked, virtual=False)
        except NotFound:
            if not asked.endswith(_TAG):
                raise
            asked = asked.removesuffix(_TAG)
            await self._registry.resolve_known(asked, virtual=False)
        return asked

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body = await self._gateway.read(request)
        return await self._gateway.forward(request, body, await self._name(decode(body, _Body).model))

    async def _refuse_registration(self, request: web.Request) -> web.Response:
        raise NotSupported(f"{request.path} is not supported: register models with POST /admin/v1/models")


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
