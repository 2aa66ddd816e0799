"""Has another pod load or unload a model, over its HTTP port. Implements mesh.placement.peer_loads.PeerLoads."""

import asyncio
from collections.abc import Mapping

import aiohttp
import msgspec

from mesh.access.peer_keys import PeerKeys
from mesh.client.connections import Connections
from mesh.errors import MeshError, Unavailable
from mesh.registry.records import InstanceRecord

_ANSWER_S = 3.0


class HttpPeerLoads:
    def __init__(self, connections: Connections, peers: PeerKeys) -> None:
        self._connections = connections
        self._peers = peers

    async def load(
        self, pod: InstanceRecord, model_id: str, *, last_used_ms: int, urgent: bool, is_extra: bool
    ) -> None:
        content = {
            "model": model_id,
            "last_used_ms": last_used_ms,
            "urgent": urgent,
            "is_extra": is_extra,
        }
        await self._post(pod, "/models/load", content)

    async def unload_now(self, pod: InstanceRecord, model_id: str) -> None:
        await self._post(pod, "/models/unload", {"model": model_id, "now": True})

    async def _post(self, pod: InstanceRecord, path: str, content: Mapping[str, object]) -> None:
        session, base = self._connections.http(pod.http_address, of_pod=True)
        body = msgspec.json.encode(content)
        headers = {**dict(self._peers.headers()), "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(_ANSWER_S),
                session.post(f"{base}{path}", data=body, headers=headers) as answer,
            ):
                if answer.status != 200:
                    raise MeshError(f"{pod.http_address} answered {answer.status}: {(await answer.text())[:200]}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{pod.http_address}: {error or 'no answer'}") from None
