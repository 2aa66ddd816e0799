"""Decides which hosts models may be fetched from, and connects only to addresses that were checked.

A registration names the place that its files come from, so without this check it could make the runtime read from services that only the
runtime can reach: a cloud's metadata server, an admin port on loopback, a neighbour in the private network. Names are resolved here and the
connection goes to the address that was checked, so a name that resolves differently a second time gains nothing.
"""

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import ConfigError
from runtime.errors import InvalidRequest, LoadFailed

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ANY = "*"


@dataclass(frozen=True, slots=True)
class Destinations:
    """Public addresses, and what the operator has listed: `hosts` by name in lower case (`*` = every host), and `networks`."""

    hosts: frozenset[str] = frozenset()
    networks: tuple[_Network, ...] = field(default=())

    @classmethod
    def parse(cls, entries: Iterable[str]) -> "Destinations":
        """Read the setting `source_hosts`: names, addresses and networks such as 10.0.0.0/8. Raises ConfigError."""
        hosts, networks = set(), []
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
                continue
            except ValueError:
                pass
            if "/" in entry or ":" in entry or not entry.isprintable() or not entry:
                raise ConfigError(f"source_hosts {entry!r}: expected a host name, an address, a network or *")
            hosts.add(_plain(entry))
        return cls(frozenset(hosts), tuple(networks))

    def trusting(self, *hosts: str) -> "Destinations":
        """Return these destinations and hosts that the operator's own configuration names."""
        added = {_plain(host) for host in hosts if host}
        literals = [ipaddress.ip_network(address) for host in added if (address := _literal(host)) is not None]
        return Destinations(self.hosts | added, (*self.networks, *literals))

    def require_listed(self, host: str, setting: str) -> None:
        """Raise InvalidRequest unless the operator lists the host: for libraries that open their own connections."""
        address = _literal(host)
        if not self._is_listed(host) and not (address is not None and self._is_allowed(address)):
            raise InvalidRequest(
                f"{setting}: host {host[:100]!r} is not in the runtime's source_hosts; list it there, or put {setting} into a "
                "storage configuration file",
                param="storage_params",
            )

    def check_behind_proxy(self, host: str) -> None:
        """Raise LoadFailed for an address or a local name that a proxy must not be asked for. The proxy resolves other names."""
        address = _literal(host)
        is_local = _plain(host) == "localhost" or _plain(host).endswith(".localhost")
        if not self._is_listed(host) and (is_local or (address is not None and not self._is_allowed(address))):
            raise _refused(host)

    def connect(self, host: str, port: int, timeout_s: float) -> socket.socket:
        """Connect to the first allowed address of a host that answers. Raises LoadFailed if none is allowed, OSError."""
        is_listed = self._is_listed(host)
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if not is_listed and not self._is_allowed(ipaddress.ip_address(str(address[0]).partition("%")[0])):
                continue
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout_s)
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        if failure is not None:
            raise failure
        raise _refused(host)

    def _is_listed(self, host: str) -> bool:
        return _ANY in self.hosts or _plain(host) in self.hosts

    def _is_allowed(self, address: _Address) -> bool:
        if any(address in network for network in self.networks) or _ANY in self.hosts:
            return True
        embedded = _embedded(address)
        return all(one.is_global and not one.is_multicast for one in embedded or (address,))


def _embedded(address: _Address) -> tuple[ipaddress.IPv4Address, ...]:
    """Return the IPv4 addresses that a translated or tunnelled IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return tuple(one for one in found if one is not None)


def _literal(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()


def _refused(host: str) -> LoadFailed:
    return LoadFailed(
        f"host {host[:100]!r} is not a public address, and models may be fetched from other addresses only if the runtime's "
        "source_hosts lists them"
    )
