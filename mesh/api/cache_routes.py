"""Serves the disk cache of this pod's runtime: what lies there, for which registered names, and dropping it."""

import msgspec
from aiohttp import web

from mesh.api.http_body import decode, read_body
from mesh.client.admin import CacheEntry, CacheListing, Dropped
from mesh.registry.registry import Registry
from mesh.types import RuntimeClient

_BODY_BYTES = 1024 * 1024


class _Drop(msgspec.Struct, frozen=True):
    keys: list[str]


class CacheRoutes:
    def __init__(self, registry: Registry, runtime: RuntimeClient) -> None:
        self._registry = registry
        self._runtime = runtime

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_get("/admin/v1/cache", self.list)
        router.add_post("/admin/v1/cache/drop", self.drop)

    async def list(self, _: web.Request) -> web.Response:
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
            )
            for file in files
        ]
        return _json(CacheListing(budget_bytes, entries))

    async def drop(self, request: web.Request) -> web.Response:
        """Drop entries by key. Those that a loaded model uses stay."""
        asked = decode(await read_body(request, _BODY_BYTES), _Drop)
        freed_bytes, num_in_use = await self._runtime.drop_files(asked.keys)
        return _json(Dropped(freed_bytes, num_in_use))


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
