"""Builds one pod's mesh from its parts (store, registry, placement, routing, ports), starts and stops it."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from common.addresses import check_free, parse_address
from common.background_tasks import BackgroundTasks
from mesh.access.access import Access
from mesh.config.schema import MeshConfig
from mesh.envoy.plan import Carrier
from mesh.errors import InvalidRequest
from mesh.placement.copies import LocalCopies
from mesh.placement.copy_scaler import CopyScaler
from mesh.placement.heartbeat import Heartbeat
from mesh.placement.reaper import Reaper
from mesh.pod.dynamic_settings import dynamic_settings
from mesh.pod.envoy import PodEnvoy
from mesh.pod.identity import Ports, check_addresses, default_instance_id, own_record
from mesh.pod.placement_parts import build_placement, pod_base
from mesh.pod.servers import PodState, build_servers
from mesh.pod.worker_process import start_worker_process
from mesh.pod.workers import PodWorkers, StartWorker, check_workers
from mesh.registry.models_file import DeclaredModels, read_models_file
from mesh.registry.registry import Registry
from mesh.registry.static_models import parse_static_models, register_static_models
from mesh.registry.transitions import Transitions
from mesh.store.factory import store_at
from mesh.store.location import EtcdLocation, parse_store
from mesh.types import ModelStatus

logger = logging.getLogger(__name__)


class Pod:
    """One pod. Call `start`, then `stop`, on one event loop. Raises MeshError for an invalid configuration.

    `start_worker`: starts one of the workers that the configuration may ask for.
    """

    def __init__(self, config: MeshConfig, *, start_worker: StartWorker = start_worker_process) -> None:
        if not config.store:
            raise InvalidRequest("store is missing: set it to a directory or to etcd://HOST:PORT")
        check_addresses(config)
        check_workers(config)
        self._config = config
        self._start_worker = start_worker
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
        self._tasks = BackgroundTasks()
        self._heartbeat: Heartbeat | None = None
        self._build()

    def _build(self) -> None:
        config = self._config
        base = pod_base(config, self.instance_id, self.store, self.registry, self.access)
        parts = build_placement(base, self._publish_record, self._withdraw)
        self._envoy = PodEnvoy(base, parts) if config.envoy else None
        self._workers = PodWorkers(base, parts, self._start_worker) if config.workers else None
        self._front = self._envoy or self._workers
        self._connections, self._changes = base.connections, base.changes
        self._copies, self._loads = parts.copies, parts.loads
        self.contact, self.peer_health, self.monitor = parts.contact, parts.peer_health, parts.monitor
        self._silence = parts.silence
        self.states, self.placement, self.reconciler = parts.states, parts.placement, parts.reconciler
        is_leader = self.registry.instances.is_leader
        self._declared_models = DeclaredModels(
            config.models_file, self.registry, self.placement, is_loaded=self._is_loaded
        )
        self._transitions = Transitions(self.registry, self.placement, self.states, is_leader=is_leader)
        self._reaper = Reaper(self.registry, is_leader=is_leader)
        self.scaler = CopyScaler(
            self.registry, self.placement, self._copies, self._loads, self.states, self.monitor, is_leader=is_leader
        )
        self._dynamic_config = dynamic_settings(self.store, self.registry.config_prefix, config)
        servers = build_servers(base, parts, PodState(self.is_ready, self._stopping, self._drained))
        self._router, self.grpc, self.http = servers.router, servers.grpc, servers.http
        self.side_ports = servers.side_ports

    @property
    def is_front_connected(self) -> bool:
        """Whether an Envoy takes its clusters from this pod, or all workers their names."""
        return self._front is not None and self._front.is_connected

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
        if self._front is not None:
            await self._front.start()
        for kind, server in (("gRPC", self.grpc), ("HTTP", self.http)):
            await asyncio.to_thread(check_free, parse_address(server.address), kind)
            await _listening(kind, server.address, server.start())
        if self._workers is not None:
            await self._workers.open()
        own = own_record(self._config, self.ports)
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
        for work in (
            self._register_static(),
            self._heartbeat.run(),
            self._publish_readiness(),
            self._reaper.run(),
            self.contact.run(),
            self.access.run(),
            self.peer_health.run(),
            self._silence.run(),
            self.scaler.run(),
            self._dynamic_config.run(),
            *(() if self._front is None else (self._front.run(),)),
        ):
            self._tasks.start(work)
        logger.info("pod is up", extra={"instance": self.instance_id, "grpc": self.ports.grpc, "http": self.ports.http})

    async def stop(self) -> None:
        """Refuse new requests, let running ones end within the grace period, and withdraw this pod's records."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        drained = asyncio.create_task(self._drain_front())
        logger.info("pod stops", extra={"instance": self.instance_id})
        await self._tasks.cancel()
        self._router.stop()
        if self._heartbeat is not None:
            await self.grpc.set_ready(False)
            self._heartbeat.leave()
            await self._publish_record()
            await self.scaler.hand_over()
            await self.reconciler.withdraw()
        await drained
        await asyncio.gather(self.grpc.stop(self._config.grace_s), self.http.stop())
        if self._heartbeat is not None:
            await self._transitions.close()
        await self.reconciler.close()
        if self._front is not None:
            await self._front.stop()
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

    @property
    def failed(self) -> asyncio.Event:
        """Set once a part of the pod has failed. Stop the pod and start another one."""
        return self._tasks.failed

    @property
    def ports(self) -> Ports:
        """Return the ports at which callers and peers reach this pod: those of Envoy or of the workers, if there are any."""
        grpc, http = self.grpc.port, self.http.port
        if self._envoy is not None:
            grpc, http = (
                parse_address(address).port for address in (self._config.grpc_listen, self._config.http_listen)
            )
        if self._workers is not None:
            grpc, http = (self._workers.ports[carrier] for carrier in Carrier)
        return Ports(grpc, http, self.grpc.peer_port, self.http.peer_port)

    async def _drain_front(self) -> None:
        if self._front is not None:
            await self._front.drain(self._config.grace_s)

    async def _withdraw(self, model_id: str) -> None:
        if self._front is not None:
            await self._front.withdraw(model_id)

    async def _publish_record(self) -> None:
        # While the store does not answer, the heartbeat publishes the record when it is back.
        if self._heartbeat is not None and self.store.is_answering:
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


async def _listening(kind: str, address: str, starting: Coroutine[Any, Any, None]) -> None:
    try:
        await starting
    except OSError as error:
        raise OSError(f"{kind} address {address} cannot be listened on: {error.strerror or error}") from None
