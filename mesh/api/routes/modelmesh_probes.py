"""Answers the probes and the preStop hook that ModelMesh's controller configures for a pod."""

import asyncio
import contextlib
from collections.abc import Callable

from aiohttp import web

_NOT_READY = 503


class ModelMeshProbes:
    """`/ready` and `/live`. `is_peer_leaving`: another pod is shutting down."""

    def __init__(self, is_ready: Callable[[], bool], is_peer_leaving: Callable[[], bool]) -> None:
        self._is_ready = is_ready
        self._is_peer_leaving = is_peer_leaving
        self._has_been_ready = False

    async def ready(self, _: web.Request) -> web.Response:
        """Answer 200 if the pod takes requests.

        As in ModelMesh, a new pod becomes ready only while no other pod is leaving: a rolling update then replaces the next
        pod after the models of the last one were taken over.
        """
        is_ready = self._is_ready() and (self._has_been_ready or not self._is_peer_leaving())
        self._has_been_ready = self._has_been_ready or is_ready
        return web.Response(status=200 if is_ready else _NOT_READY)

    async def live(self, _: web.Request) -> web.Response:
        return web.Response()


class PreStopHook:
    """`/prestop`, which Kubernetes calls before it stops the runtime's containers: they serve until the mesh has drained."""

    def __init__(self, drained: asyncio.Event, timeout_s: float) -> None:
        self._drained = drained
        self._timeout_s = timeout_s

    async def wait(self, _: web.Request) -> web.Response:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s):
                await self._drained.wait()
        return web.Response()
