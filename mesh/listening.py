"""Addresses to listen on and to reach: `HOST:PORT` or `unix:PATH`. Knows how they are written, opens none."""

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
