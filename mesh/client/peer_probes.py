"""Asks other pods over their HTTP ports whether they answer, and when the store last answered them."""

import asyncio
import errno

import aiohttp
import msgspec

from mesh.client.connections import Connections
from mesh.registry.records import InstanceRecord
from mesh.registry.store_contact import PeerGone
from mesh.routing.peer_health import ProbeResult

_ANSWER_S = 0.75


class Readiness(msgspec.Struct, frozen=True):
    """The body of `/readyz`. `store_silence_s`: seconds since the store last answered. `lost_records`: see Registry.num_lost."""

    status: str
    store_silence_s: float = 0.0
    lost_records: int = 0


class HttpPeerProbes:
    """Implements mesh.registry.store_contact.PeerContacts and mesh.routing.peer_health.PeerProbe."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def store_silence_s(self, pod: InstanceRecord) -> float | None:
        readiness = await self._ask(pod.http_address)
        return None if readiness is None else readiness.store_silence_s

    async def probe(self, http_address: str) -> ProbeResult:
        try:
            return ProbeResult.SILENT if await self._ask(http_address) is None else ProbeResult.ANSWERED
        except PeerGone:
            return ProbeResult.REFUSED

    async def _ask(self, http_address: str) -> Readiness | None:
        session, base = self._connections.http(http_address, of_pod=True)
        try:
            async with asyncio.timeout(_ANSWER_S), session.get(f"{base}/readyz") as answer:
                return msgspec.json.decode(await answer.read(), type=Readiness)
        except aiohttp.ClientConnectorError as error:
            if error.os_error.errno == errno.ECONNREFUSED:
                raise PeerGone from None
            return None
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
            return None
