"""Builds the parts of a pod that take requests: the router, the gRPC and HTTP servers, and the ports beside them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from common.version import package_version
from mesh.api.adapter_choice import AdapterChooser
from mesh.api.addressing import Addressing
from mesh.api.grpc_server import GrpcServer
from mesh.api.http_gateway import HttpGateway
from mesh.api.http_server import HttpServer
from mesh.api.inference import InferenceGateway
from mesh.api.management import ManagementService
from mesh.api.model_view import ModelViews
from mesh.api.oip_server import OipServer
from mesh.api.registrar import Registrar
from mesh.api.request_memory import RequestMemory
from mesh.api.routes.admin import AdminRoutes
from mesh.api.routes.cache_routes import CacheRoutes
from mesh.api.routes.health import HealthRoutes
from mesh.api.routes.lora_routes import LoraRoutes
from mesh.api.routes.models_routes import ModelsRoutes
from mesh.api.routes.oip_routes import OipRoutes
from mesh.api.routes.ollama_routes import OllamaRoutes
from mesh.api.routes.openai_routes import OpenAiRoutes
from mesh.api.routes.openapi_route import OpenApiRoute
from mesh.api.routes.root_page import RootPage
from mesh.api.routes.tgi_routes import TgiRoutes
from mesh.api.side_port import SidePort
from mesh.api.web_guard import policy_for
from mesh.client.peer_caches import HttpPeerCaches
from mesh.client.peer_probes import Readiness
from mesh.envoy.bootstrap import envoy_files
from mesh.envoy.plan import Carrier
from mesh.pod.figures import figures_of
from mesh.pod.limits import connection_limits, grpc_limits, request_memory_bytes
from mesh.pod.placement_parts import PlacementParts, PodBase
from mesh.pod.side_ports import side_ports
from mesh.registry.registration import check_key
from mesh.registry.registry import Registry
from mesh.routing.router import CopyRouter, Limits
from mesh.types import ModelInfo, Target


@dataclass(frozen=True, slots=True)
class PodState:
    """The state of the pod as a whole that its servers show.

    Attributes:
        stopping: set when the pod begins to shut down.
        drained: set when it has let its last request end.
    """

    is_ready: Callable[[], bool]
    stopping: asyncio.Event
    drained: asyncio.Event


@dataclass(frozen=True, slots=True)
class Servers:
    router: CopyRouter
    grpc: GrpcServer
    http: HttpServer
    side_ports: tuple[SidePort, ...]


def build_servers(base: PodBase, parts: PlacementParts, pod: PodState) -> Servers:
    """Build the servers, not started."""
    config = base.config
    router, memory = _router(base, parts), RequestMemory(request_memory_bytes(config))
    registrar = Registrar(base.registry, parts.placement, parts.states, parts.monitor, parts.runtime)
    adapters = AdapterChooser(base.registry, registrar, lambda: parts.monitor.snapshot.foreign)
    health = HealthRoutes(
        base.connections,
        config.runtime_http,
        lambda: Readiness(
            "ready" if pod.is_ready() else "not ready", round(base.store.silence_s(), 3), base.registry.num_lost
        ),
        lambda: _metrics_text(base, parts),
    )
    ports = side_ports(
        config,
        base.registry.instances,
        instance_id=base.instance_id,
        is_ready=pod.is_ready,
        drained=pod.drained,
        metrics=health.metrics,
    )
    return Servers(
        router,
        _grpc_server(base, parts, router, memory, registrar, adapters, pod),
        _http_server(base, parts, router, memory, health, registrar, adapters, pod),
        ports,
    )


def _router(base: PodBase, parts: PlacementParts) -> CopyRouter:
    config = base.config
    return CopyRouter(
        base.registry,
        parts.placement,
        parts.states,
        parts.monitor,
        parts.copies,
        parts.learned,
        base.changes,
        base.metrics,
        Target(base.instance_id, True, config.runtime_inference_grpc or config.runtime_grpc, config.runtime_http),
        Limits(config.wait_budget_s, config.max_held, config.max_in_flight_per_copy),
        parts.in_flight,
        parts.peer_health,
        is_cut_off=lambda: parts.contact.is_cut_off,
    )


def _grpc_server(
    base: PodBase,
    parts: PlacementParts,
    router: CopyRouter,
    memory: RequestMemory,
    registrar: Registrar,
    adapters: AdapterChooser,
    pod: PodState,
) -> GrpcServer:
    config, access = base.config, base.access
    addressing = Addressing(config.dataplane_config)

    def check_info(info: ModelInfo) -> None:
        """Check a registration before it is stored. A foreign runtime has model keys of its own, which only it can check."""
        runtime = parts.monitor.snapshot
        if runtime.ready and not runtime.foreign:
            check_key(info)

    is_direct = not config.envoy and not config.workers
    return GrpcServer(
        config.grpc_listen if is_direct else envoy_files(config).mesh(Carrier.GRPC),
        ManagementService(
            base.registry,
            parts.placement,
            parts.states,
            check_info=check_info,
            fit_of=registrar.fit_of,
            read_only=config.read_only,
        ),
        InferenceGateway(
            base.registry,
            router,
            base.connections,
            addressing,
            adapters,
            base.metrics,
            peers=access.peers,
            limits=lambda: parts.monitor.limits,
            memory=memory,
            max_message_bytes=config.grpc_max_message_bytes,
            behind_worker=bool(config.workers),
        ),
        own_oip=OipServer(base.registry, parts.states, addressing, is_ready=pod.is_ready, version=package_version()),
        guard=access.guard,
        tls=access.tls if is_direct else None,
        behind_envoy=bool(config.envoy),
        peer_address=config.peer_grpc_listen,
        peer_tls=access.peer_tls,
        limits=grpc_limits(config),
    )


def _http_server(
    base: PodBase,
    parts: PlacementParts,
    router: CopyRouter,
    memory: RequestMemory,
    health: HealthRoutes,
    registrar: Registrar,
    adapters: AdapterChooser,
    pod: PodState,
) -> HttpServer:
    config, access, registry = base.config, base.access, base.registry

    views = ModelViews(registry, parts.states, lambda model_id: _last_used_ms(parts, registry, model_id))
    gateway = HttpGateway(
        registry,
        parts.states,
        router,
        base.connections,
        base.metrics,
        peers=access.peers,
        max_body_bytes=config.http_max_body_bytes,
        keep_alive_s=config.keep_alive_s,
        memory=memory,
    )
    is_direct = not config.envoy and not config.workers
    return HttpServer(
        config.http_listen if is_direct else envoy_files(config).mesh(Carrier.HTTP),
        (
            health,
            ModelsRoutes(registry, parts.placement, registrar, views, base.changes, pod.stopping),
            LoraRoutes(registry, parts.placement, registrar),
            AdminRoutes(registry, registrar, parts.states, parts.monitor, parts.runtime, views),
            CacheRoutes(registry, parts.runtime, HttpPeerCaches(base.connections, access.peers)),
            RootPage(views, package_version(), lambda: access.guard.requires_keys),
            OpenApiRoute(base.connections, config.runtime_http),
            OpenAiRoutes(gateway, adapters, is_foreign=lambda: parts.monitor.snapshot.foreign),
            TgiRoutes(gateway, registry, adapters),
            OllamaRoutes(gateway, registry, parts.placement, views),
            OipRoutes(
                gateway, registry, parts.states, parts.placement, is_ready=pod.is_ready, version=package_version()
            ),
        ),
        base.metrics,
        guard=access.guard,
        tls=access.tls if is_direct else None,
        behind_envoy=bool(config.envoy),
        peer_address=config.peer_http_listen,
        peer_tls=access.peer_tls,
        limits=connection_limits(config),
        web_policy=policy_for(config.http_listen, (*config.allowed_hosts, config.advertise_host), config.cors_origins),
        grace_s=config.grace_s,
    )


def _last_used_ms(parts: PlacementParts, registry: Registry, model_id: str) -> int:
    """Return when any pod last used a model, as far as this pod knows; 0 if unknown."""
    copy = parts.copies.get(model_id)
    own_ms = copy.last_used_ms if copy is not None else 0
    # There is no record of any pod until this one has written its own.
    return max([own_ms, *(pod.used_ms.get(model_id, 0) for _, pod in registry.instances.items())])


def _metrics_text(base: PodBase, parts: PlacementParts) -> bytes:
    registry = base.registry
    return base.metrics.text(
        figures_of(parts.copies, registry), lambda name: name in registry.models.table or name in registry.vmodels.table
    )
