"""Serves the pod's gRPC port: management, the server's part of the Open Inference Protocol, health, reflection, and forwarding of the rest."""

import asyncio

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.grpc.health import Health
from common.grpc.reflection import reflection_handlers
from mesh.access.guard import Guard
from mesh.access.tls import TlsIdentity
from mesh.api.grpc_handlers import GrpcHandlers, OwnHandlers, admit_by, admit_peers
from mesh.api.grpc_listener import GrpcLimits, listen, make_server
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
_HEALTH = "grpc.health.v1.Health"


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
        self._server = make_server(limits, limits.caller_options())
        self._peer_server: grpc.aio.Server | None = None
        # A server that is never started logs an error when the process ends.
        if peer_tls is not None:
            self._peer_server = make_server(limits)
            # Peers only forward inference.
            self._peer_server.add_generic_rpc_handlers((GrpcHandlers(admit_peers, (), gateway.calls),))
        own = OwnHandlers()
        own.add(management, add_ModelMeshServicer_to_server)
        own.add(self._health, health_pb2_grpc.add_HealthServicer_to_server)
        own.add_generic_rpc_handlers(reflection_handlers((*_SERVICES, _HEALTH)))
        own.add_generic_rpc_handlers((own_oip.handler(), LegacyManagement(management)))
        self._server.add_generic_rpc_handlers(
            (
                GrpcHandlers(
                    admit_by(guard, behind_envoy=behind_envoy),
                    own.generic,
                    gateway.calls,
                    behind_envoy=behind_envoy,
                ),
            )
        )
        self.port = 0
        self.peer_port = 0

    async def start(self) -> None:
        """Raises OSError if an address is taken."""
        self.port = listen(self._server, self.address, self._tls)
        await self._server.start()
        if self._peer_server is not None:
            self.peer_port = listen(self._peer_server, self._peer_address, self._peer_tls)
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
