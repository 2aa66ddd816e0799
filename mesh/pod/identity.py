"""Determines a pod's id, and the address at which other pods reach it."""

import hashlib
import secrets
import socket
from dataclasses import dataclass

from common.addresses import parse_address
from common.clock import epoch_ms
from common.version import package_version
from mesh.config.schema import MeshConfig
from mesh.registry.records import InstanceRecord

_HOST_CHARACTERS = 32
_ADDRESSES = (
    *("grpc_listen", "http_listen", "runtime_grpc", "runtime_inference_grpc", "runtime_http"),
    *("peer_grpc_listen", "peer_http_listen"),
    *("probe_listen", "prestop_listen", "metrics_listen"),
)
_ANY_HOST = ("", "0.0.0.0", "[::]", "::", "*")


def default_instance_id(grpc_listen: str) -> str:
    """Return an id that is stable over restarts, and different for pods of one host and for hosts with similar names."""
    host = socket.gethostname().replace(",", "-")
    if len(host) > _HOST_CHARACTERS:
        host = f"{host[: _HOST_CHARACTERS - 9]}-{hashlib.sha1(host.encode(), usedforsecurity=False).hexdigest()[:8]}"
    port = grpc_listen.rpartition(":")[2]
    if grpc_listen.startswith("unix:") or port == "0":
        return f"{host}-{secrets.token_hex(3)}"
    return f"{host}-{port}"


def check_addresses(config: MeshConfig) -> None:
    """Raise ConfigError for an address that is neither HOST:PORT nor unix:PATH."""
    for name in _ADDRESSES:
        if address := getattr(config, name):
            parse_address(address, name)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports that the servers listen on; 0 for a unix socket or no listener."""

    grpc: int
    http: int
    peer_grpc: int = 0
    peer_http: int = 0


def own_record(config: MeshConfig, ports: Ports) -> InstanceRecord:
    """Return the part of this pod's record that does not change while it runs."""
    host = config.advertise_host
    return InstanceRecord(
        start_time_ms=epoch_ms(),
        version=version_number(package_version()),
        location=config.location or config.advertise_host or socket.gethostname(),
        zone=config.zone,
        labels=tuple(sorted(config.labels)),
        grpc_address=advertised_address(config.grpc_listen, ports.grpc, host),
        http_address=advertised_address(config.http_listen, ports.http, host),
        peer_grpc_address=advertised_address(config.peer_grpc_listen, ports.peer_grpc, host),
        peer_http_address=advertised_address(config.peer_http_listen, ports.peer_http, host),
    )


def version_number(version: str) -> int:
    """Return `vers` of a pod's record, which grows from release to release. 0 for a version that is not numbers and dots.

    It is smaller than any of ModelMesh's, which are build dates, so that Java pods place models on Java pods first: they cannot
    forward to ours.
    """
    numbers = version.split(".")[:3]
    if not all(number.isdecimal() for number in numbers):
        return 0
    major, minor, patch = (*map(int, numbers), 0, 0)[:3]
    return (major * 1000 + minor) * 1000 + patch


def advertised_address(listen: str, port: int, host: str) -> str:
    """Return the address at which other pods reach a listener; empty if there is none."""
    if not listen or listen.startswith("unix:"):
        return listen
    own = listen.rpartition(":")[0]
    return f"{host or (_own_ip() if own in _ANY_HOST else own)}:{port}"


def _own_ip() -> str:
    """Return the address that this host would send from. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
