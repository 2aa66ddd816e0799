"""Serves the pod's gRPC port: management, the server's part of the Open Inference Protocol, health, reflection, and forwarding of the rest."""

import asyncio
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.grpc.health import Health
from common.grpc.reflection import reflection_handlers
from mesh.access.guard import Guard
from mesh.access.tls import TlsIdentity
from mesh.api.grpc_handlers import GrpcHandlers, OwnHandlers, admit_by, admit_peers
from mesh.api.grpc_tls import server_credentials
from mesh.api.inference import InferenceGateway
from mesh.api.legacy_management import LegacyManagement
from mesh.api.oip_server import SERVICE_NAME as OIP_NAME
from mesh.api.oip_server import OipServer
from wire.fmaas import generation_pb2
from wire.mmesh import model_mesh_pb2
from wire.mmesh.model_mesh_pb2_grpc import ModelMeshServicer, add_ModelMeshServicer_to_server

_SERVICES = (
    model_mesh_pb2.DESCRIPTOR.services_by_name["ModelMesh"].full_name,
    OIP_NAME,
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
)
_MAX_PENDING = 1_000_000
_HANDSHAKE_MS = 20_000
_HEALTH = "grpc.health.v1.Health"


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """Limits of the listeners.

    Attributes:
        max_message_bytes, max_header_bytes: of one message and of the headers of one call; 0 stands for gRPC's default.
        max_streams: concurrent calls of one connection.
        idle_s: the time after which a connection without calls is closed.
        max_age_s, max_age_grace_s: the age at which a caller's connection is closed, and the time that its calls then have; 0 for none.
    """

    max_message_bytes: int
    max_streams: int
    idle_s: float
    max_header_bytes: int = 0
    max_age_s: float = 0.0
    max_age_grace_s: float = 0.0

    def caller_options(self) -> tuple[tuple[str, int], ...]:
        """Return the gRPC options of the limits that are set and that only callers have."""
        options = (
            ("grpc.max_metadata_size", self.max_header_bytes),
            ("grpc.absolute_max_metadata_size", self.max_header_bytes),
            ("grpc.max_connection_age_ms", round(self.max_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", round(self.max_age_grace_s * 1000)),
        )
        return tuple((name, value) for name, value in options if value)


class GrpcServer:
    """`address`: `HOST:PORT` or `unix:PATH`; port 0 takes a free one. `peer_address` serves other pods if there is a `peer_tls`.

    `behind_envoy`: `address` is a socket that only Envoy connects to.
    """

    def __init__(
        self,
        address: str,
        management: ModelMeshServicer,
        gateway: InferenceGateway,
        *,
        own_oip: OipServer,
        guard: Guard,
        tls: TlsIdentity | None,
        peer_address: str,
        peer_tls: TlsIdentity | None,
        limits: GrpcLimits,
        behind_envoy: bool = False,
    ) -> None:
        self.address = address
        self._tls = tls
        self._peer_address = peer_address
        self._peer_tls = peer_tls
        self._health = Health()
        options = (
            ("grpc.max_receive_message_length", limits.max_message_bytes),
            ("grpc.max_send_message_length", limits.max_message_bytes),
            # gRPC would cancel calls of a burst by itself. Requests beyond the pod's own limits get RESOURCE_EXHAUSTED.
            ("grpc.server.max_pending_requests", _MAX_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
            ("grpc.max_concurrent_streams", limits.max_streams),
            ("grpc.max_connection_idle_ms", round(limits.idle_s * 1000)),
            # Covers TLS and the first frame of a client, which may never send one.
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            # Two servers that share one port would split its requests without an error.
            ("grpc.so_reuseport", 0),
            # A held request is silent for minutes. By default gRPC closes connections on which a client pings
            # more than twice in five minutes without data.
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A crashed host sends no FIN, and its sequence would run to the end.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.ping_timeout_ms", 20_000),
        )
        self._server = grpc.aio.server(options=(*options, *limits.caller_options()))
        self._peer_server: grpc.aio.Server | None = None
        # A server that is never started logs an error when the process ends.
        if peer_tls is not None:
            self._peer_server = grpc.aio.server(options=options)
            # Peers only forward inference.
            self._peer_server.add_generic_rpc_handlers((GrpcHandlers(admit_peers, (), gateway),))
        own = OwnHandlers()
        own.add(management, add_ModelMeshServicer_to_server)
        own.add(self._health, health_pb2_grpc.add_HealthServicer_to_server)
        own.add_generic_rpc_handlers(reflection_handlers((*_SERVICES, _HEALTH)))
        own.add_generic_rpc_handlers((own_oip.handler(), LegacyManagement(management)))
        self._server.add_generic_rpc_handlers(
            (GrpcHandlers(admit_by(guard, behind_envoy=behind_envoy), own.generic, gateway),)
        )
        self.port = 0
        self.peer_port = 0

    async def start(self) -> None:
        """Raises OSError if an address is taken."""
        self.port = _listen(self._server, self.address, self._tls)
        await self._server.start()
        if self._peer_server is not None:
            self.peer_port = _listen(self._peer_server, self._peer_address, self._peer_tls)
            await self._peer_server.start()
        await self.set_ready(False)

    async def set_ready(self, ready: bool) -> None:
        """Report readiness to health checks."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests; running ones may end within the grace period."""
        servers = (self._server, self._peer_server)
        await asyncio.gather(*(server.stop(grace_s) for server in servers if server is not None))


def _listen(server: grpc.aio.Server, address: str, tls: TlsIdentity | None) -> int:
    """Add a port to a server and return its number. Raises OSError."""
    try:
        port = (
            server.add_insecure_port(address)
            if tls is None
            else server.add_secure_port(address, server_credentials(tls))
        )
    except RuntimeError as error:
        raise OSError(str(error)) from None
    if not port:
        raise OSError(f"cannot listen on {address}")
    return port
