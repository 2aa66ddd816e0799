"""Serves the model routes of chat front ends: OpenAI's /v1/models, and llama.cpp's status, load, unload and events."""

import asyncio
import time
from typing import Any

import msgspec
from aiohttp import web

from common.changes import Changes
from common.clock import epoch_ms
from common.public_uri import public_uri
from mesh.access.caller import current_caller
from mesh.api.http_body import decode, read_body
from mesh.api.model_view import ModelViews, Origin
from mesh.api.registrar import Registrar
from mesh.api.request_log import Record
from mesh.api.sse_keepalive import HEADERS
from mesh.client.admin import Model
from mesh.errors import InvalidRequest
from mesh.placement.placement import Placement
from mesh.registry.registration import DEFAULT_TYPE, model_info
from mesh.registry.registry import Registry

_BODY_BYTES = 64 * 1024
_POLL_S = 0.25
_KEEP_ALIVE_S = 15.0
_FAILED = ("failed", "quarantined")


class _ModelRequest(msgspec.Struct, frozen=True):
    """`now`: of an unload, end running requests instead of waiting for them."""

    model: str = ""
    last_used_ms: int = 0
    urgent: bool = True
    is_extra: bool = False
    now: bool = False


class Progress(msgspec.Struct, frozen=True):
    """llama.cpp's shape: the current stage, and its progress from 0 to 1."""

    stages: list[str]
    current: str
    value: float
    text: str = ""


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """llama.cpp's shape, in which `failed` marks an unloaded model whose last load failed. `error` and `tier` are additions."""

    value: str
    progress: Progress | None = None
    failed: bool = False
    error: str = ""
    tier: str = ""


_UNLOADED = Status("unloaded")


class Entry(msgspec.Struct, frozen=True):
    """OpenAI's shape. As vLLM has them, `root` is the place of the files, and `parent` the name of the base whose LoRA adapter the model is."""

    id: str
    status: Status
    object: str = "model"
    created: int = 0
    owned_by: str = "repertory"
    root: str = ""
    parent: str | msgspec.UnsetType = msgspec.UNSET
    max_model_len: int | msgspec.UnsetType = msgspec.UNSET  # of a loaded model, as vLLM has it


class Listing(msgspec.Struct, frozen=True):
    data: list[Entry]
    object: str = "list"


class Event(msgspec.Struct, frozen=True):
    model: str
    event: str
    data: dict[str, Any]


class ModelsRoutes:
    def __init__(
        self,
        registry: Registry,
        placement: Placement,
        registrar: Registrar,
        views: ModelViews,
        changes: Changes,
        stopping: asyncio.Event,
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._registrar = registrar
        self._views = views
        self._changes = changes
        self._stopping = stopping

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/models", self.list)
        router.add_get("/models", self.list)
        router.add_post("/models", self.add)
        router.add_delete("/models", self.remove)
        router.add_get("/models/sse", self.events)
        router.add_get("/v1/models/{name:.+}", self.show)
        router.add_post("/models/load", self.load)
        router.add_post("/models/unload", self.unload)

    async def list(self, _: web.Request) -> web.Response:
        origins = self._views.origins()
        return _json(Listing([_entry(name, model, origins[name]) for name, model in self._views.states()]))

    async def show(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        model = await self._views.one(name)
        return _json(_entry(name, model, Origin(public_uri(model.uri), model.settings.get("adapter_of"))))

    async def add(self, request: web.Request) -> web.Response:
        """Register a repository of the Hugging Face hub, or a URI, under its own name and begin to load it, as a front end's "download" asks."""
        asked = decode(await read_body(request, _BODY_BYTES), _ModelRequest)
        if not asked.model:
            raise InvalidRequest("model is missing: a repository of the Hugging Face hub, such as org/name, or a URI")
        uri = asked.model if "://" in asked.model else f"hf://{asked.model}"
        info = model_info(asked.model, uri, {}, model_type=DEFAULT_TYPE)
        registration = await self._registrar.register(asked.model, info, load=True)
        Record.of(request).model_id = registration.model_id
        return _json({"success": True})

    async def remove(self, request: web.Request) -> web.Response:
        """Remove the name in `?model=`, after its copies are unloaded. Files stay in the cache until their room is needed."""
        name = request.query.get("model", "")
        if not name:
            raise InvalidRequest("model is missing: name it as DELETE /models?model=NAME")
        Record.of(request).model_id = await self._registrar.remove(name)
        return _json({"success": True})

    async def load(self, request: web.Request) -> web.Response:
        """Start a load and respond at once; the status shows its progress. A load that another pod asks for takes place on this pod."""
        asked = decode(await read_body(request, _BODY_BYTES), _ModelRequest)
        if current_caller().is_peer:
            last_used_ms = min(max(asked.last_used_ms, 0), epoch_ms())
            await self._placement.load_for_peer(
                asked.model, last_used_ms=last_used_ms, urgent=asked.urgent, is_extra=asked.is_extra
            )
        else:
            record = Record.of(request)
            record.model_id = await self._resolve(asked)
            await self._placement.ensure_loaded(record.model_id, retry_failed=True)
        return _json({"success": True})

    async def unload(self, request: web.Request) -> web.Response:
        """Unload all copies, then respond. The model stays registered. If another pod asks, unload this pod's copy."""
        asked = decode(await read_body(request, _BODY_BYTES), _ModelRequest)
        if current_caller().is_peer:
            await self._placement.unload_locally(asked.model, now=asked.now)
            return _json({"success": True})
        record = Record.of(request)
        record.model_id = await self._resolve(asked)
        await self._placement.unload(record.model_id, now=asked.now)
        return _json({"success": True})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Stream each model's current status, then its changes, until the client disconnects."""
        response = web.StreamResponse(headers={**HEADERS, "X-Request-Id": Record.of(request).request_id})
        await response.prepare(request)
        known: dict[str, Status] = {}
        sent_s = time.monotonic()
        while not self._stopping.is_set():
            seen = self._changes.version
            now = {name: _status(model) for name, model in self._views.states()}
            for name in known.keys() - now.keys():
                await _send(response, Event(name, "model_removed", {"status": "unloaded"}))
            for name, status in now.items():
                if known.get(name) != status:
                    kind = "status_change" if name in known else "model_status"
                    sent_s = time.monotonic()
                    await _send(response, Event(name, kind, _event_data(status)))
            known = now
            if time.monotonic() - sent_s > _KEEP_ALIVE_S:
                sent_s = time.monotonic()
                await response.write(b": keep-alive\n\n")
            await asyncio.sleep(_POLL_S)
            await self._changes.wait(1.0, since=seen)
        await response.write_eof()
        return response

    async def _resolve(self, asked: _ModelRequest) -> str:
        if not asked.model:
            raise InvalidRequest("model is missing: it names the model")
        return await self._registry.resolve_fresh(asked.model)


def _entry(name: str, model: Model | None, origin: Origin) -> Entry:
    longest = max((copy.max_model_len for copy in model.copies), default=0) if model is not None else 0
    return Entry(
        name,
        _status(model),
        root=origin.root,
        parent=origin.parent or msgspec.UNSET,
        max_model_len=longest or msgspec.UNSET,
    )


def _status(model: Model | None) -> Status:
    """Convert a view; None is an unloaded and healthy model."""
    if model is None:
        return _UNLOADED
    if model.state == "loaded" or (not model.state and model.status == "LOADED"):
        return Status("loaded", tier=model.tier)
    if model.state in _FAILED or model.status == "LOADING_FAILED":
        return Status("unloaded", failed=True, error=model.error)
    if not model.state or model.state == "unloading":
        return Status("unloaded")
    progress = Progress(["pulling", "packing", "loading"], model.state, round(model.progress, 3), model.progress_text)
    return Status("loading", progress=progress)


def _event_data(status: Status) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(status)
    data["status"] = data.pop("value")
    return data


async def _send(response: web.StreamResponse, event: Event) -> None:
    await response.write(b"data: " + msgspec.json.encode(event) + b"\n\n")


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
