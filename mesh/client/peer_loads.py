"""Has another pod load or unload a model, over its HTTP port. Implements mesh.placement.placement.PeerLoads."""

import asyncio

import aiohttp
import msgspec

from mesh.client.connections import HOP_HEADER, Connections
from mesh.errors import MeshError, Unavailable
from mesh.registry.records import InstanceRecord

_ANSWER_S = 10.0


class HttpPeerLoads:
    """`key`: a bearer key that the pods share, or empty."""

    def __init__(self, connections: Connections, own_id: str, key: str) -> None:
        self._connections = connections
        self._headers = {HOP_HEADER: own_id, "Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    async def load(self, pod: InstanceRecord, model_id: str, *, last_used_ms: int) -> None:
        await self._post(pod, "/models/load", {"model": model_id, "last_used_ms": last_used_ms})

    async def unload_now(self, pod: InstanceRecord, model_id: str) -> None:
        await self._post(pod, "/models/unload", {"model": model_id, "now": True})

    async def _post(self, pod: InstanceRecord, path: str, content: dict[str, object]) -> None:
        session, base = self._connections.http(pod.http_address)
        body = msgspec.json.encode(content)
        try:
            async with (
                asyncio.timeout(_ANSWER_S),
                session.post(f"{base}{path}", data=body, headers=self._headers) as answer,
            ):
                if answer.status != 200:
                    raise MeshError(f"{pod.http_address} answered {answer.status}: {(await answer.text())[:200]}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"{pod.http_address}: {error or 'no answer'}") from None
