"""Reads the limits of a pod's listeners from its configuration."""

from mesh.api.connection_limits import ConnectionLimits
from mesh.api.grpc_listener import GrpcLimits
from mesh.config.schema import MeshConfig


def grpc_limits(config: MeshConfig) -> GrpcLimits:
    return GrpcLimits(
        max_message_bytes=config.grpc_max_message_bytes,
        max_streams=config.grpc_max_streams,
        idle_s=config.grpc_idle_timeout_s,
        max_header_bytes=config.grpc_max_header_bytes,
        max_age_s=config.grpc_max_connection_age_s,
        max_age_grace_s=config.grpc_max_connection_age_grace_s,
    )


def connection_limits(config: MeshConfig, *, num_processes: int = 1) -> ConnectionLimits:
    """Return the limits of HTTP connections. Each of several processes may have its share of them, rounded up."""
    return ConnectionLimits(
        -(-config.max_connections // num_processes),
        config.http_header_timeout_s,
        config.http_body_timeout_s,
        config.http_idle_timeout_s,
        config.http_write_timeout_s,
    )


def request_memory_bytes(config: MeshConfig) -> int:
    """Return the memory for requests of each process that holds any: the workers and the one that decides."""
    return config.request_memory_bytes // (config.workers + 1)
