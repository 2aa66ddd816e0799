"""Determines a pod's id, and the address at which other pods reach it."""

import hashlib
import secrets
import socket

_HOST_CHARACTERS = 32
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


def advertised_address(listen: str, port: int, host: str) -> str:
    if listen.startswith("unix:"):
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
