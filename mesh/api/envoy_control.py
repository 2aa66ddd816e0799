"""Serves Envoy's control stream on a unix socket: delta ADS, in which only clusters are sent."""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
import hashlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any

from common.addresses import check_free, parse_address
from common.changes import Changes
from mesh.api.envoy_clusters import CLUSTER_TYPE, PeerTls, encoded
from mesh.envoy.delta import DeltaStream
from mesh.envoy.plan import Cluster
from wire import envoy_pb2 as pb

logger = logging.getLogger(__name__)

_METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
_VERSION_BYTES = 8
_CONFIRM_S = 5.0  # the longest wait for an Envoy that does not confirm
_MAX_MESSAGE_BYTES = 256 * 1024 * 1024

Context = grpc.aio.ServicerContext[pb.DeltaDiscoveryRequest, pb.DeltaDiscoveryResponse]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A cluster as it is sent. `met_peers`: this version has other pods among its endpoints, or an earlier one had, whose calls may still run."""

    cluster: Cluster
    version: str
    content: bytes
    met_peers: bool


@dataclass(eq=False, slots=True)
class _Session:
    """One Envoy's stream.

    Attributes:
        is_open: Envoy has listed its resources, so changes can be sent.
        has_refused: Envoy has refused clusters that it was sent.
        changed: the names of clusters that have changed since the last message; None before the first one, for which all are compared.
    """

    delta: DeltaStream = field(default_factory=DeltaStream)
    changed: set[str] | None = None
    is_open: bool = False
    has_refused: bool = False


class EnvoyControl:
    """Implements mesh.envoy.interfaces.ControlStream. `address`: of its socket. `peer_tls` returns this pod's certificate towards other pods.

    `strays` is called with the names of clusters that an Envoy has and the mesh has not published, as after a restart of the mesh.
    """

    def __init__(
        self, address: str, peer_tls: Callable[[], PeerTls | None], strays: Callable[[frozenset[str]], None]
    ) -> None:
        self._address = address
        self._peer_tls = peer_tls
        self._strays = strays
        self._clusters: dict[str, _Encoded] = {}
        self._versions: dict[str, str] = {}
        self._encoded_with: PeerTls | None = None
        self._generation = 0
        self._nonces = itertools.count(1)
        self._sessions: set[_Session] = set()
        self._changes = Changes()
        self._server: grpc.aio.Server | None = None

    @property
    def is_connected(self) -> bool:
        return any(session.is_open for session in self._sessions)

    async def start(self) -> None:
        """Raises OSError if the socket cannot be listened on."""
        await asyncio.to_thread(check_free, parse_address(self._address), "Envoy's control")
        server = grpc.aio.server(
            options=(
                ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            )
        )
        server.add_generic_rpc_handlers((_Handler(self._serve),))
        server.add_insecure_port(self._address)
        await server.start()
        self._server = server

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def publish(self, changed: Mapping[str, Cluster], removed: Iterable[str]) -> int:
        peer_tls = self._peer_tls()
        if peer_tls != self._encoded_with:
            self._encoded_with = peer_tls
            changed = {**{name: known.cluster for name, known in self._clusters.items()}, **changed}
        different = {name for name in removed if self._clusters.pop(name, None) is not None}
        for name in different:
            del self._versions[name]
        for name, cluster in changed.items():
            before = self._clusters.get(name)
            met_peers = cluster.meets_peers or (before is not None and before.met_peers)
            content = encoded(cluster, peer_tls, met_peers=met_peers)
            version = hashlib.blake2b(content, digest_size=_VERSION_BYTES).hexdigest()
            self._clusters[name] = _Encoded(cluster, version, content, met_peers)
            if self._versions.get(name) != version:
                self._versions[name] = version
                different.add(name)
        if different or not self._generation:
            self._generation += 1
            for session in self._sessions:
                if session.changed is not None:
                    session.changed |= different
            self._changes.notify()
        return self._generation

    async def confirmed(self, generation: int) -> bool:
        try:
            async with asyncio.timeout(_CONFIRM_S):
                while any(session.delta.confirmed < generation for session in self._sessions if session.is_open):
                    await self._changes.wait()
        except TimeoutError:
            logger.warning("Envoy has not confirmed a change of its clusters within %g s", _CONFIRM_S)
            return False
        return not any(session.has_refused for session in self._sessions)

    async def _serve(self, requests: AsyncIterator[pb.DeltaDiscoveryRequest], context: Context) -> None:
        session = _Session()
        self._sessions.add(session)
        reading = asyncio.create_task(self._read(requests, session))
        try:
            while not reading.done():
                seen = self._changes.version
                if session.is_open and self._generation:
                    await self._send(session, context)
                changed = asyncio.ensure_future(self._changes.wait(since=seen))
                await asyncio.wait((reading, changed), return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            reading.cancel()
            self._sessions.discard(session)
            self._changes.notify()

    async def _read(self, requests: AsyncIterator[pb.DeltaDiscoveryRequest], session: _Session) -> None:
        async for request in requests:
            if request.type_url != CLUSTER_TYPE:
                continue
            if request.response_nonce:
                if request.error_detail.message:
                    session.has_refused = True
                    logger.error("Envoy refuses clusters: %s", request.error_detail.message)
                session.delta.answered(request.response_nonce)
            elif not session.is_open:
                session.delta.known = dict(request.initial_resource_versions)
                session.is_open = True
                if strays := frozenset(session.delta.known) - self._clusters.keys():
                    self._strays(strays)
                logger.info("Envoy is connected", extra={"clusters": len(session.delta.known)})
            self._changes.notify()

    async def _send(self, session: _Session, context: Context) -> None:
        nonce, confirmed = str(next(self._nonces)), session.delta.confirmed
        difference = session.delta.next(self._versions, self._generation, nonce, among=session.changed)
        session.changed = set()
        if difference is None:
            if session.delta.confirmed != confirmed:
                self._changes.notify()
            return
        await context.write(
            pb.DeltaDiscoveryResponse(
                type_url=CLUSTER_TYPE,
                nonce=nonce,
                system_version_info=str(self._generation),
                resources=[self._resource(name) for name in difference.changed],
                removed_resources=difference.removed,
            )
        )

    def _resource(self, name: str) -> pb.Resource:
        known = self._clusters[name]
        return pb.Resource(name=name, version=known.version, resource=Any(type_url=CLUSTER_TYPE, value=known.content))


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, serve: Callable[[AsyncIterator[pb.DeltaDiscoveryRequest], Context], object]) -> None:
        self._serve = serve

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[pb.DeltaDiscoveryRequest, pb.DeltaDiscoveryResponse] | None:
        if handler_call_details.method != _METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=pb.DeltaDiscoveryRequest.FromString,
            response_serializer=pb.DeltaDiscoveryResponse.SerializeToString,
        )
