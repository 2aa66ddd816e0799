"""Stores and connections over a test's etcd, and their events."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.store.etcd import EtcdStore
from mesh.store.etcd_connection import EtcdConnection
from mesh.store.location import EtcdLocation
from mesh.store.protocol import WatchEvent


@asynccontextmanager
async def opened(
    *endpoints: str, connect_timeout_s: float = 20.0, call_timeout_s: float = 3.5
) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(EtcdLocation(endpoints), connect_timeout_s=connect_timeout_s, call_timeout_s=call_timeout_s)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def connected(endpoint: str) -> AsyncIterator[EtcdConnection]:
    connection = EtcdConnection(EtcdLocation((endpoint,)), connect_timeout_s=20.0, call_timeout_s=3.5)
    await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


async def take(events: AsyncIterator[WatchEvent], count: int) -> list[WatchEvent]:
    """Return the next events, within 20 s."""
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(count)]
