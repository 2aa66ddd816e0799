"""Addresses to listen on and to reach, `HOST:PORT` or `unix:PATH`: how they are written, and whether one is free."""

import socket

from mesh.errors import InvalidRequest

_PORTS = 65536


def check_address(what: str, address: str) -> None:
    """`what` names it in the message. Raises InvalidRequest."""
    if address.startswith("unix:"):
        if not address.removeprefix("unix:").strip("/"):
            raise InvalidRequest(f"{what} {address!r}: the socket's path is missing")
        return
    _, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) >= _PORTS:
        raise InvalidRequest(f"{what} {address!r}: expected HOST:PORT with a port below {_PORTS}, or unix:PATH")


def check_free(what: str, address: str) -> None:
    """Raises OSError, in words for whoever started it, if the port can't be listened on. A server may still meet one that was quicker."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or port == "0":
        return
    try:
        family, kind, _, _, own = socket.getaddrinfo(host.strip("[]") or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(own)
    except OSError as error:
        raise OSError(f"{what} address {address} can't be listened on: {error.strerror or error}") from None
