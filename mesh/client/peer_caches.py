"""Lists and drops the files in another pod's disk cache, over its HTTP port."""

import asyncio
from typing import TypeVar

import aiohttp
import msgspec

from mesh.access.peer_keys import PeerKeys
from mesh.client.admin import CacheListing, Dropped
from mesh.client.connections import Connections
from mesh.errors import MeshError, Unavailable
from mesh.registry.records import InstanceRecord

T = TypeVar("T")

_LIST_S = 10.0
_DROP_S = 60.0  # dropping terabytes takes a while


class HttpPeerCaches:
    """A pod answers a peer with its own cache alone. Raises Unavailable if it does not answer, MeshError with its message if it refuses."""

    def __init__(self, connections: Connections, peers: PeerKeys) -> None:
        self._connections = connections
        self._peers = peers

    async def listing(self, pod: InstanceRecord) -> CacheListing:
        return await self._call(pod, "GET", "/admin/v1/cache", None, CacheListing, _LIST_S)

    async def drop(self, pod: InstanceRecord, keys: list[str]) -> Dropped:
        body = msgspec.json.encode({"keys": keys})
        return await self._call(pod, "POST", "/admin/v1/cache/drop", body, Dropped, _DROP_S)

    async def _call(
        self, pod: InstanceRecord, method: str, path: str, body: bytes | None, kind: type[T], timeout_s: float
    ) -> T:
        session, base = self._connections.http(pod.http_address, of_pod=True)
        headers = {**dict(self._peers.headers()), "Content-Type": "application/json"}
        try:
            async with (
                asyncio.timeout(timeout_s),
                session.request(method, f"{base}{path}", data=body, headers=headers) as answer,
            ):
                content = await answer.read()
                if answer.status != 200:
                    raise MeshError(_message(content) or f"it answered {answer.status}")
                return msgspec.json.decode(content, type=kind)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise Unavailable(f"it does not answer at {pod.http_address} ({error or 'no answer in time'})") from None


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error = _Error()


def _message(content: bytes) -> str:
    """Return the message of an error's body; empty if it has none."""
    try:
        return msgspec.json.decode(content, type=_ErrorBody).error.message
    except msgspec.MsgspecError:
        return ""
