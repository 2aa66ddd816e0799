"""Connects to other pods over mutual TLS. All pods' certificates carry one name that is not in DNS, so it is resolved here."""

import asyncio
import socket
import ssl

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from common.addresses import parse_address


class AddressResolver(AbstractResolver):
    """Resolves every name to one host."""

    def __init__(self, host: str) -> None:
        self._host = host

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await asyncio.get_running_loop().getaddrinfo(self._host, port, family=family, type=socket.SOCK_STREAM)
        return [
            ResolveResult(hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=0)
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Release nothing: there is no connection to a name server."""


def tls_connector(
    address: str, context: ssl.SSLContext, socket_factory: "aiohttp.connector.SocketFactoryType"
) -> aiohttp.TCPConnector:
    """Return a connector whose connections all go to the address."""
    return aiohttp.TCPConnector(
        limit=0,
        ssl=context,
        resolver=AddressResolver(parse_address(address).host),
        use_dns_cache=False,
        socket_factory=socket_factory,
    )
