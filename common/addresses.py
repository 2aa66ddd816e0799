"""Addresses to listen on and to connect to, written `HOST:PORT` or `unix:PATH`, and a check that one is free."""

import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError

_NUM_PORTS = 65536


@dataclass(frozen=True, slots=True)
class Address:
    """Either `path`, or `host` and `port` (0 = any free port)."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


def parse_address(text: str, what: str = "address") -> Address:
    """Parse an address. `what` names the setting in the error. Raises ConfigError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path.strip("/"):
            raise ConfigError(f"{what} {text!r}: the path of the socket is missing")
        return Address(path=path)
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) >= _NUM_PORTS:
        raise ConfigError(f"{what} {text!r}: expected HOST:PORT with a port below {_NUM_PORTS}, or unix:PATH")
    return Address(host=host.strip("[]") or "0.0.0.0", port=int(port))


def check_free(address: Address, what: str = "") -> None:
    """Check that no other process listens at an address, and remove a socket file that no process listens on.

    `what` names the address in the error. Another process may still take the address after the check. Raises OSError.
    """
    prefix = f"{what} address " if what else ""
    if address.path:
        _check_socket_free(address, prefix)
    elif address.port:
        try:
            family, kind, _, _, bound = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(bound)
        except OSError as error:
            raise OSError(f"{prefix}{address} cannot be listened on: {error.strerror or error}") from None


def reserve(address: Address) -> socket.socket:
    """Bind a port, or a free one for port 0, without listening, so that only sockets with SO_REUSEPORT of this user can listen at it.

    The port stays reserved until the socket is closed. Raises OSError if it is taken.
    """
    family, kind, _, _, bound = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    holder = socket.socket(family, kind)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(bound)
    except OSError as error:
        holder.close()
        raise OSError(f"{address} cannot be listened on: {error.strerror or error}") from None
    return holder


def _check_socket_free(address: Address, prefix: str) -> None:
    path = Path(address.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise OSError(f"{prefix}{address} cannot be listened on: a file that is not a socket exists there")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(address.path)
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise OSError(f"{prefix}{address} cannot be listened on: another process listens there")
