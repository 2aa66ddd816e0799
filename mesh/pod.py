"""Builds one pod's mesh from its parts (store, registry, placement, routing, ports), starts and stops it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from common.addresses import check_free, parse_address
from common.changes import Changes
from common.version import package_version
from mesh.access.access import Access
from mesh.api.addressing import Addressing
from mesh.api.admin import AdminRoutes
from mesh.api.grpc_server import GrpcServer
from mesh.api.health import HealthRoutes
from mesh.api.http_gateway import HttpGateway
from mesh.api.http_server import HttpServer
from mesh.api.inference import InferenceGateway
from mesh.api.management import ManagementService
from mesh.api.model_view import ModelViews
from mesh.api.models_routes import ModelsRoutes
from mesh.api.oip_routes import OipRoutes
from mesh.api.oip_server import OipServer
from mesh.api.ollama_routes import OllamaRoutes
from mesh.api.openai_routes import OpenAiRoutes
from mesh.api.openapi_route import OpenApiRoute
from mesh.api.registrar import Registrar
from mesh.api.request_memory import RequestMemory
from mesh.api.root_page import RootPage
from mesh.api.tgi_routes import TgiRoutes
from mesh.api.web_guard import policy_for
from mesh.client.connections import Connections
from mesh.client.peer_loads import HttpPeerLoads
from mesh.client.peer_probes import HttpPeerProbes, Readiness
from mesh.client.runtime import GrpcRuntime
from mesh.config import MeshConfig
from mesh.dynamic_settings import dynamic_settings
from mesh.errors import InvalidRequest
from mesh.metrics import Metrics
from mesh.placement.copies import LocalCopies
from mesh.placement.heartbeat import Heartbeat
from mesh.placement.loads import LocalLoads
from mesh.placement.model_states import ModelStates
from mesh.placement.placement import Placement
from mesh.placement.reaper import Reaper
from mesh.placement.reconciler import Reconciler
from mesh.placement.record_updates import RecordUpdates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.placement.type_constraints import TypeConstraints
from mesh.pod_figures import figures_of
from mesh.pod_identity import Ports, check_addresses, default_instance_id, own_record
from mesh.registry.models_file import DeclaredModels, read_models_file
from mesh.registry.registration import check_key
from mesh.registry.registry import Registry
from mesh.registry.static_models import parse_static_models, register_static_models
from mesh.registry.store_contact import StoreContact
from mesh.registry.transitions import Transitions
from mesh.routing.in_flight import InFlight
from mesh.routing.peer_health import PeerHealth
from mesh.routing.router import CopyRouter, Limits
from mesh.side_ports import side_ports
from mesh.store.factory import store_at
from mesh.store.location import EtcdLocation, parse_store
from mesh.types import ModelInfo, ModelStatus, Target

logger = logging.getLogger(__name__)


class Pod:
    """One pod. Call `start`, then `stop`, on one event loop. Raises MeshError for an invalid configuration."""

    def __init__(self, config: MeshConfig) -> None:
        if not config.store:
            raise InvalidRequest("store is missing: set it to a directory or to etcd://HOST:PORT")
        check_addresses(config)
        self._config = config
        self.instance_id = config.instance_id or default_instance_id(config.grpc_listen)
        if "," in self.instance_id:
            raise InvalidRequest(f"instance_id {self.instance_id!r} may not contain a comma")
        location = parse_store(config.store)
        self.store = store_at(location, lambda: parse_store(config.store))
        self.registry = Registry(
            self.store,
            root_prefix=location.root_prefix,
            kv_prefix=config.kv_prefix,
            service_name=config.service_name,
            instance_id=self.instance_id,
            session_ttl_s=config.session_ttl_s,
            default_owner=config.owner,
        )
        self.access = Access(
            config,
            self.store,
            f"{location.root_prefix}/{config.kv_prefix}/{config.service_name}",
            self.instance_id,
            has_peers=isinstance(location, EtcdLocation),
        )
        self._static_models = parse_static_models(config.static_models)
        if config.models_file:
            read_models_file(config.models_file)  # raises ConfigError before anything is started
        self._static_registered = False
        self._stopping = asyncio.Event()
        self._drained = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._heartbeat: Heartbeat | None = None
        self._build()

    def _build(self) -> None:
        config = self._config
        self._metrics = Metrics()
        self._connections = Connections(
            max_message_bytes=config.grpc_max_message_bytes,
            tls=self.access.peer_tls,
            peer_name=config.peer_tls_name,
            secure_address=self.registry.instances.secure_address,
        )
        self._changes = Changes()
        self._copies = LocalCopies(self._changes)
        probes = HttpPeerProbes(self._connections)
        self.contact = StoreContact(
            self.store, self.registry.instances, probes, self._changes, ttl_s=config.session_ttl_s
        )
        self._in_flight = InFlight()
        self.peer_health = PeerHealth(
            probes, self._in_flight, self._changes, address_of=self._http_address_of, gone_after_s=config.session_ttl_s
        )
        runtime = GrpcRuntime(self._connections.grpc(config.runtime_grpc))
        record_updates = RecordUpdates(self.registry.models, self.instance_id)
        self._loads = LocalLoads(
            runtime,
            record_updates,
            self._copies,
            self._changes,
            self._metrics,
            load_timeout_s=config.load_timeout_s,
            grace_s=config.grace_s,
            publish=self._publish_record,
            busy_s=lambda model_id: self.monitor.busy_s(model_id),
            others=lambda: self.states.others(),
            reported=lambda: self.monitor.snapshot.models,
        )
        peers = HttpPeerLoads(self._connections, self.access.peers)
        self.monitor = RuntimeMonitor(
            runtime,
            self._copies,
            self._loads,
            self._changes,
            first_ready=lambda: self.reconciler.first_ready(),
            changed=lambda snapshot: self.reconciler.runtime_changed(snapshot),
            lost=self._runtime_lost,
        )
        self.states = ModelStates(
            self.registry,
            self._copies,
            self._loads,
            self.monitor,
            failure_expiry_s=config.failure_expiry_s,
            is_usable=self.peer_health.is_usable,
        )
        self.placement = Placement(
            self.registry,
            runtime,
            record_updates,
            self._copies,
            self._loads,
            peers,
            self.states,
            self.monitor,
            self._changes,
            constraints=TypeConstraints(config.type_constraints),
            own_labels=config.labels,
            unreachable=self.peer_health.suspect,
        )
        self._declared_models = DeclaredModels(
            config.models_file, self.registry, self.placement, is_loaded=self._is_loaded
        )
        self.reconciler = Reconciler(
            self.registry,
            record_updates,
            self._copies,
            self._loads,
            self.placement,
            self.states,
            self.monitor,
            self._changes,
        )
        self._transitions = Transitions(
            self.registry, self.placement, self.states, is_leader=self.registry.instances.is_leader
        )
        self._reaper = Reaper(self.registry, is_leader=self.registry.instances.is_leader)
        self._router = CopyRouter(
            self.registry,
            self.placement,
            self.states,
            self.monitor,
            self._copies,
            self._changes,
            self._metrics,
            Target(self.instance_id, True, config.runtime_inference_grpc or config.runtime_grpc, config.runtime_http),
            Limits(config.wait_budget_s, config.max_held),
            self._in_flight,
            self.peer_health,
            is_cut_off=lambda: self.contact.is_cut_off,
        )
        memory = RequestMemory(config.request_memory_bytes)
        addressing = Addressing.parse(config.dataplane_config)
        self.grpc = GrpcServer(
            config.grpc_listen,
            ManagementService(
                self.registry, self.placement, self.states, check_info=self._check_info, read_only=config.read_only
            ),
            InferenceGateway(
                self.registry,
                self._router,
                self._connections,
                addressing,
                self._metrics,
                peers=self.access.peers,
                limits=lambda: self.monitor.limits,
                max_message_bytes=config.grpc_max_message_bytes,
                memory=memory,
            ),
            own_oip=OipServer(
                self.registry, self.states, addressing, is_ready=self.is_ready, version=package_version()
            ),
            guard=self.access.guard,
            tls=self.access.tls,
            peer_address=config.peer_grpc_listen,
            peer_tls=self.access.peer_tls,
            max_message_bytes=config.grpc_max_message_bytes,
        )
        registrar = Registrar(self.registry, self.placement, self.states, self.monitor, runtime)
        views = ModelViews(self.registry, self.states, self._last_used_ms)
        gateway = HttpGateway(
            self.registry,
            self.states,
            self._router,
            self._connections,
            self._metrics,
            peers=self.access.peers,
            max_body_bytes=config.http_max_body_bytes,
            memory=memory,
            keep_alive_s=config.keep_alive_s,
        )
        health = HealthRoutes(self._connections, config.runtime_http, self._readiness, self._figures)
        self.side_ports = side_ports(
            config,
            self.registry.instances,
            instance_id=self.instance_id,
            is_ready=self.is_ready,
            drained=self._drained,
            metrics=health.metrics,
        )
        self._dynamic_config = dynamic_settings(self.store, self.registry.config_prefix, config)
        self.http = HttpServer(
            config.http_listen,
            (
                health,
                ModelsRoutes(self.registry, self.placement, registrar, views, self._changes, self._stopping),
                AdminRoutes(self.registry, registrar, self.states, self.monitor, runtime, views),
                RootPage(views, package_version(), lambda: self.access.guard.requires_keys),
                OpenApiRoute(self._connections, config.runtime_http),
                OpenAiRoutes(gateway, is_foreign=lambda: self.monitor.snapshot.foreign),
                TgiRoutes(gateway, self.registry),
                OllamaRoutes(gateway, self.registry, self.placement, views),
                OipRoutes(
                    gateway,
                    self.registry,
                    self.states,
                    self.placement,
                    is_ready=self.is_ready,
                    version=package_version(),
                ),
            ),
            self._metrics,
            guard=self.access.guard,
            tls=self.access.tls,
            peer_address=config.peer_http_listen,
            peer_tls=self.access.peer_tls,
            web_policy=policy_for(
                config.http_listen, (*config.allowed_hosts, config.advertise_host), config.cors_origins
            ),
            grace_s=config.grace_s,
        )

    @property
    def copies(self) -> LocalCopies:
        """This pod's copies and their counts of running and waiting requests, to be read only."""
        return self._copies

    async def apply_models_file(self) -> None:
        """Register what the models file declares now. Does nothing without such a file."""
        if self._config.models_file:
            await self._declared_models.apply()

    def is_ready(self) -> bool:
        """Return whether this pod accepts requests and can load models for them."""
        return (
            self._static_registered
            and self._heartbeat is not None
            and self.monitor.is_ready
            and self.contact.is_ready
            and not self._stopping.is_set()
        )

    async def start(self) -> None:
        """Start serving. Raises StoreError, or OSError if a port is in use."""
        for port in self.side_ports:
            await port.start()
        await self.store.open()
        await self._dynamic_config.check_enabled()
        await self.registry.start()
        await self.access.start()
        for kind, address, server in (
            ("gRPC", self._config.grpc_listen, self.grpc),
            ("HTTP", self._config.http_listen, self.http),
        ):
            await asyncio.to_thread(check_free, parse_address(address), kind)
            await _listening(kind, address, server.start())
        own = own_record(self._config, Ports(self.grpc.port, self.http.port, self.grpc.peer_port, self.http.peer_port))
        self._warn_of_duplicate_id(own.grpc_address)
        self._heartbeat = Heartbeat(
            self.registry.instances,
            own,
            self._copies,
            self._changes,
            snapshot=lambda: self.monitor.snapshot,
            num_loading=lambda: self._loads.num_loading,
            loading_threads=lambda: limits.max_loading_concurrency if (limits := self.monitor.limits) else 0,
            can_serve=lambda: self.monitor.is_serving,
            load_failures=lambda: self._loads.num_failed_in_a_row,
        )
        self.reconciler.start()
        self._transitions.start()
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                self._register_static(),
                self._heartbeat.run(),
                self._publish_readiness(),
                self._reaper.run(),
                self.contact.run(),
                self.access.run(),
                self.peer_health.run(),
                self._dynamic_config.run(),
            )
        ]
        logger.info("pod is up", extra={"instance": self.instance_id, "grpc": self.grpc.port, "http": self.http.port})

    async def stop(self) -> None:
        """Refuse new requests, let running ones end within the grace period, and withdraw this pod's records."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        logger.info("pod stops", extra={"instance": self.instance_id})
        await _cancel(self._tasks)
        self._router.stop()
        if self._heartbeat is not None:
            await self.grpc.set_ready(False)
            await self._heartbeat.shut_down()
            await self.reconciler.withdraw()
        await asyncio.gather(self.grpc.stop(self._config.grace_s), self.http.stop())
        if self._heartbeat is not None:
            await self._transitions.close()
        await self.reconciler.close()
        await self.registry.close()
        await self._connections.close()
        await self.store.close()
        self._drained.set()
        for port in self.side_ports:
            await port.stop()

    async def _register_static(self) -> None:
        await register_static_models(
            self._static_models,
            self.registry,
            self.placement,
            is_loaded=self._is_loaded,
        )
        await self.apply_models_file()
        self._static_registered = True

    def _is_loaded(self, model_id: str) -> bool:
        return self.states.status(model_id).status is ModelStatus.LOADED

    async def _publish_record(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.flush()

    def _warn_of_duplicate_id(self, grpc_address: str) -> None:
        """Log a warning if a pod with the same id has another address. The record may be this pod's own from before a restart."""
        other = self.registry.instances.get(self.instance_id)
        if other is not None and other.grpc_address != grpc_address:
            logger.warning(
                "instance_id %s is also that of a pod at %s; if that pod still runs, configure different ids",
                self.instance_id,
                other.grpc_address or "an unknown address",
            )

    async def _publish_readiness(self) -> None:
        published = False
        while True:
            seen = self._changes.version
            if self.is_ready() is not published:
                published = not published
                await self.grpc.set_ready(published)
            await self._changes.wait(1.0, since=seen)

    def _http_address_of(self, instance_id: str) -> str | None:
        """Return the address to probe a pod at; None without a record, empty while the pod shuts down and answers what it has begun."""
        record = self.registry.instances.get(instance_id)
        if record is None:
            return None
        return "" if record.shutting_down else record.http_address

    def _runtime_lost(self) -> None:
        """Have requests answered elsewhere that wait for this pod's runtime, which does not answer."""
        self._in_flight.lose(self.instance_id, committed=False)

    def _readiness(self) -> Readiness:
        return Readiness(
            "ready" if self.is_ready() else "not ready", round(self.store.silence_s(), 3), self.registry.num_lost
        )

    def _check_info(self, info: ModelInfo) -> None:
        """Check a registration before it is stored. A foreign runtime has model keys of its own, which only it can check."""
        runtime = self.monitor.snapshot
        if runtime.ready and not runtime.foreign:
            check_key(info)

    def _last_used_ms(self, model_id: str) -> int:
        copy = self._copies.get(model_id)
        return copy.last_used_ms if copy is not None else 0

    def _figures(self) -> bytes:
        return self._metrics.text(figures_of(self._copies, self.registry), self._is_registered)

    def _is_registered(self, name: str) -> bool:
        return name in self.registry.models.table or name in self.registry.vmodels.table


async def _listening(kind: str, address: str, starting: Coroutine[Any, Any, None]) -> None:
    try:
        await starting
    except OSError as error:
        raise OSError(f"{kind} address {address} can't be listened on: {error.strerror or error}") from None


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
