"""Addresses to listen on: `unix:PATH` or `HOST:PORT`. Tells a taken one from a stale socket file before a server meets it."""

import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidRequest, Unavailable


@dataclass(frozen=True, slots=True)
class Address:
    """Either `path`, or `host` and `port` (0 = any free one)."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Raises InvalidRequest."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:").removeprefix("//")
        if not path:
            raise InvalidRequest(f"address {text!r}: the path is missing")
        return Address(path=path)
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"address {text!r}: expected unix:PATH or HOST:PORT")
    return Address(host=host.strip("[]") or "0.0.0.0", port=int(port))


def claim(address: Address) -> None:
    """Raise Unavailable if someone listens there already; clear away a socket file that nobody answers on."""
    if address.path:
        path = Path(address.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise Unavailable(f"{address} is in the way: it is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(address.path)
            except OSError:
                path.unlink(missing_ok=True)
                return
        raise Unavailable(f"{address} is taken: another process listens there")
    if address.port:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address.host, address.port))
            except OSError as error:
                raise Unavailable(f"{address} can't be listened on: {error.strerror}") from None
