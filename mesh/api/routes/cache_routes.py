"""Serves the disk caches of all pods: lists entries with the registered names that need them, and drops entries."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

from mesh.access.caller import current_caller
from mesh.api.http_body import decode, read_body
from mesh.client.admin import CacheEntry, CacheListing, Dropped, PodCache
from mesh.client.peer_caches import HttpPeerCaches
from mesh.errors import MeshError
from mesh.registry.records import InstanceRecord
from mesh.registry.registry import Registry
from mesh.types import RuntimeClient

T = TypeVar("T")

_BODY_BYTES = 1024 * 1024


class _Drop(msgspec.Struct, frozen=True):
    keys: list[str]


class CacheRoutes:
    """Answers a peer with this pod's cache alone, and any other caller with those of all pods."""

    def __init__(self, registry: Registry, runtime: RuntimeClient, peers: HttpPeerCaches) -> None:
        self._registry = registry
        self._runtime = runtime
        self._peers = peers

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/admin/v1/cache", self.show)
        router.add_post("/admin/v1/cache/drop", self.drop)

    async def show(self, _: web.Request) -> web.Response:
        """List the cached files. A pod whose cache cannot be listed is in `pods` with the reason."""
        own, others = await asyncio.gather(self._own(), self._of_peers(self._peers.listing))
        listings = [own, *(answer for _, answer in others if isinstance(answer, CacheListing))]
        failed = [PodCache(pod, error=answer.message) for pod, answer in others if isinstance(answer, MeshError)]
        listing = CacheListing(
            budget_bytes=sum(each.budget_bytes for each in listings),
            entries=[entry for each in listings for entry in each.entries],
            pods=sorted([*(pod for each in listings for pod in each.pods), *failed], key=lambda pod: pod.instance_id),
        )
        return _json(listing)

    async def drop(self, request: web.Request) -> web.Response:
        """Drop entries by key, on each pod that has them. Those that a loaded model uses stay."""
        keys = decode(await read_body(request, _BODY_BYTES), _Drop).keys
        (freed_bytes, num_in_use), others = await asyncio.gather(
            self._runtime.drop_files(keys), self._of_peers(lambda pod: self._peers.drop(pod, keys))
        )
        dropped = [answer for _, answer in others if isinstance(answer, Dropped)]
        failed = [PodCache(pod, error=answer.message) for pod, answer in others if isinstance(answer, MeshError)]
        return _json(
            Dropped(
                freed_bytes=freed_bytes + sum(each.freed_bytes for each in dropped),
                num_in_use=num_in_use + sum(each.num_in_use for each in dropped),
                failed=failed,
            )
        )

    async def _own(self) -> CacheListing:
        pod = self._registry.instances.own_id
        budget_bytes, files = await self._runtime.list_files()
        names: dict[str, list[str]] = {}
        for named in self._registry.named():
            names.setdefault(named.record.path.partition("?")[0], []).append(named.name)
        entries = [
            CacheEntry(
                key=file.key,
                kind=file.kind,
                uri=file.uri,
                size_bytes=file.size_bytes,
                last_used_ms=file.last_used_ms,
                in_use=file.in_use,
                names=names.get(file.uri, []),
                pod=pod,
            )
            for file in files
        ]
        used_bytes = sum(file.size_bytes for file in files)
        return CacheListing(budget_bytes, entries, [PodCache(pod, budget_bytes, used_bytes)])

    async def _of_peers(self, call: Callable[[InstanceRecord], Awaitable[T]]) -> list[tuple[str, T | MeshError]]:
        """Return each other pod's answer or error. ModelMesh's own pods, which have no HTTP port, are left out."""
        if current_caller().is_peer:
            return []
        instances = self._registry.instances
        pods = [(pod, record) for pod, record in instances.items() if pod != instances.own_id]
        pods = [(pod, record) for pod, record in pods if record.http_address]

        async def answer(record: InstanceRecord) -> T | MeshError:
            try:
                return await call(record)
            except MeshError as error:
                return error

        answers = await asyncio.gather(*(answer(record) for _, record in pods))
        return [(pod, found) for (pod, _), found in zip(pods, answers, strict=True)]


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
