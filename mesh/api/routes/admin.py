"""Serves the command line's routes: register, show, remove and alias models by name, predict whether one fits, list pods.

The JSON shapes are those of mesh.client.admin.
"""

from typing import Any

import msgspec
from aiohttp import web

from common.clock import epoch_ms
from common.model_fit import ModelFit
from mesh.api.http_body import decode, read_body
from mesh.api.model_view import ModelViews
from mesh.api.registrar import Registrar
from mesh.api.request_log import Record
from mesh.client.admin import Models, Pod, Pods
from mesh.errors import InvalidRequest, NotFound, NotSupported
from mesh.placement.model_states import ModelStates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import CAPACITY_UNIT_BYTES
from mesh.registry.registration import DEFAULT_TYPE, concrete_id, model_info, with_settings
from mesh.registry.registry import Registry
from mesh.types import ModelInfo, RuntimeClient

_BODY_BYTES = 1024 * 1024


class _Register(msgspec.Struct, frozen=True, kw_only=True):
    """A registration's own fields; all others in the body are settings of the model."""

    name: str
    uri: str
    type: str = DEFAULT_TYPE
    load: bool = False


class _Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Either a registered name or a source; all other fields are settings, which replace those of a registered name."""

    name: str = ""
    uri: str = ""
    type: str | None = None
    sizes_only: bool = False


class _Alias(msgspec.Struct, frozen=True):
    target: str


class AdminRoutes:
    def __init__(
        self,
        registry: Registry,
        registrar: Registrar,
        states: ModelStates,
        monitor: RuntimeMonitor,
        runtime: RuntimeClient,
        views: ModelViews,
    ) -> None:
        self._registry = registry
        self._registrar = registrar
        self._states = states
        self._monitor = monitor
        self._runtime = runtime
        self._views = views

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/admin/v1/models", self.models)
        router.add_post("/admin/v1/models", self.register)
        router.add_get("/admin/v1/models/{name:.+}", self.model)
        router.add_delete("/admin/v1/models/{name:.+}", self.remove)
        router.add_post("/admin/v1/fit", self.fit)
        router.add_put("/admin/v1/aliases/{name:.+}", self.set_alias)
        router.add_delete("/admin/v1/aliases/{name:.+}", self.remove_alias)
        router.add_get("/admin/v1/pods", self.pods)
        router.add_post("/admin/v1/registry/accept-loss", self.accept_loss)

    async def models(self, _: web.Request) -> web.Response:
        return _json(Models(self._views.all()))

    async def model(self, request: web.Request) -> web.Response:
        return _json(await self._views.one(request.match_info["name"]))

    async def register(self, request: web.Request) -> web.Response:
        body = await read_body(request, _BODY_BYTES)
        asked = decode(body, _Register)
        if not asked.uri:
            raise InvalidRequest(f"model {asked.name}: uri is missing: it says where the files are")
        info = model_info(asked.name, asked.uri, _settings(body, _Register), model_type=asked.type)
        registration = await self._registrar.register(asked.name, info, load=asked.load)
        Record.of(request).model_id = registration.model_id
        fit = self._named(registration.fit) if registration.fit is not None else None
        return _json(msgspec.structs.replace(await self._views.one(asked.name), fit=fit))

    async def remove(self, request: web.Request) -> web.Response:
        """Unregister a name. Responds after the copies are unloaded too."""
        Record.of(request).model_id = await self._registrar.remove(request.match_info["name"])
        return web.Response(status=204)

    async def fit(self, request: web.Request) -> web.Response:
        body = await read_body(request, _BODY_BYTES)
        asked, settings = decode(body, _Fit), _settings(body, _Fit)
        if bool(asked.name) == bool(asked.uri):
            raise InvalidRequest("give either the name of a registered model or the uri of one that is not")
        if asked.name:
            model_id, info = await self._registered(asked.name)
            if settings or asked.type is not None:
                info = with_settings(info, settings, model_type=asked.type)
                model_id = concrete_id("fit", info)
        else:
            info = model_info(asked.uri, asked.uri, settings, model_type=asked.type or DEFAULT_TYPE)
            model_id = concrete_id("fit", info)
        if self._monitor.snapshot.foreign:
            raise NotSupported(f"{info.path}: this runtime cannot say whether a model fits")
        await self._registrar.check_base(info)
        answer = await self._runtime.fit(model_id, info, sizes_only=asked.sizes_only)
        unloaded: tuple[str, ...] = ()
        if answer.fits:
            # The runtime's answer lists the models that it would evict from device memory; they stay loaded. These would be unloaded.
            unloaded = self._states.would_unload(
                model_id, await self._runtime.predict_size(model_id, info) or answer.weight_bytes
            )
        return _json(self._named(answer, unloaded))

    async def set_alias(self, request: web.Request) -> web.Response:
        asked = decode(await read_body(request, _BODY_BYTES), _Alias)
        if not asked.target:
            raise InvalidRequest("target is missing: the name of the model that the alias points at")
        alias = request.match_info["name"]
        await self._registry.set_alias(alias, asked.target, now_ms=epoch_ms(), is_loaded=self._registrar.is_loaded)
        return web.Response(status=204)

    async def remove_alias(self, request: web.Request) -> web.Response:
        await self._registry.remove_alias(request.match_info["name"])
        return web.Response(status=204)

    async def accept_loss(self, _: web.Request) -> web.Response:
        """Drop the records that disappeared from the store at once, on this pod. Until then it keeps serving them and refuses changes."""
        num_lost = self._registry.num_lost
        self._registry.accept_loss()
        return web.json_response({"dropped": num_lost})

    async def pods(self, _: web.Request) -> web.Response:
        """List all pods. This pod's own figures are current; the registry's record of it is not rewritten with every request."""
        own_id, now = self._registry.instances.own_id, self._monitor.snapshot
        pods = dict(self._registry.instances.items())
        if own_id in pods:
            pods[own_id] = msgspec.structs.replace(
                pods[own_id],
                device_used_bytes=now.device_used_bytes,
                devices=now.devices,
                running=sum(model.running for model in now.models),
                waiting=sum(model.waiting for model in now.models),
            )
        return _json(
            Pods(
                [
                    Pod(
                        instance_id=instance_id,
                        grpc_address=pod.grpc_address,
                        http_address=pod.http_address,
                        capacity_bytes=pod.capacity_units * CAPACITY_UNIT_BYTES,
                        used_bytes=pod.used_units * CAPACITY_UNIT_BYTES,
                        device_budget_bytes=pod.device_budget_bytes,
                        device_used_bytes=pod.device_used_bytes,
                        num_models=pod.count,
                        loading=pod.loads_in_progress,
                        running=pod.running,
                        waiting=pod.waiting,
                        shutting_down=pod.shutting_down,
                        start_time_ms=pod.start_time_ms,
                        labels=list(pod.labels),
                        devices=list(pod.devices),
                    )
                    for instance_id, pod in pods.items()
                ]
            )
        )

    async def _registered(self, name: str) -> tuple[str, ModelInfo]:
        model_id = await self._registry.resolve_fresh(name)
        record = self._registry.models.get(model_id)
        if record is None:
            raise NotFound(f"model {name!r} not found")
        return model_id, record.info

    def _named(self, fit: ModelFit, unloaded: tuple[str, ...] = ()) -> ModelFit:
        """Return a runtime's prediction with the names of the models that it would evict, after those of `unloaded`."""
        evicts = tuple(self._registry.name_of(model_id) for model_id in dict.fromkeys((*unloaded, *fit.evicts)))
        return msgspec.structs.replace(fit, evicts=evicts)


def _settings(body: bytes, besides: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the fields of a JSON body that the struct does not declare."""
    fields = decode(body, dict[str, Any])
    return {name: value for name, value in fields.items() if name not in besides.__struct_fields__}


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
