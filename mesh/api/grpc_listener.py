"""Makes gRPC servers with the limits of a listener, and has them listen."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from mesh.access.tls import TlsIdentity
from mesh.api.grpc_tls import server_credentials

_MAX_PENDING = 1_000_000
_HANDSHAKE_MS = 20_000


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


def make_server(
    limits: GrpcLimits, further: Sequence[tuple[str, int]] = (), *, is_shared: bool = False
) -> grpc.aio.Server:
    """Return a server with the limits of every caller and further options. `is_shared`: other processes listen at its port, too."""
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
        # Two pods that share one port would split its requests without an error.
        ("grpc.so_reuseport", int(is_shared)),
        # A held request is silent for minutes. By default gRPC closes connections on which a client pings
        # more than twice in five minutes without data.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A crashed host sends no FIN, and its sequence would run to the end.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
    )
    return grpc.aio.server(options=(*options, *further))


def listen(server: grpc.aio.Server, address: str, tls: TlsIdentity | None) -> int:
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
