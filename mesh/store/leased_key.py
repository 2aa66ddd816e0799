"""Provides a key that exists as long as this process: it is put under a lease, and again if the lease is lost."""

import asyncio
import logging
from contextlib import suppress

from mesh.errors import StoreError
from mesh.store.protocol import Lease, Store

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 1.0


class LeasedKey:
    """One leased key. After a lost lease, the last value is put again without a call of `set`."""

    def __init__(self, store: Store, key: str, *, ttl_s: float) -> None:
        self._store = store
        self._key = key
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._value: bytes | None = None
        self._published = False
        self._held: Lease | None = None  # the lease under which the key was put
        self._writing = asyncio.Lock()
        self._guard: asyncio.Task[None] | None = None

    @property
    def is_held(self) -> bool:
        """Whether the key exists as far as this process knows: it was put, and its lease has not ended."""
        return self._held is not None and not self._held.lost.is_set()

    @property
    def lease(self) -> Lease | None:
        """The lease under which the key is put next; None before the first one."""
        return self._lease

    async def set(self, value: bytes) -> int:
        """Put the value and return its revision. Raises StoreError; the value is then put when the store is back."""
        self._value = value
        if self._guard is None:
            self._guard = asyncio.create_task(self._keep(), name=f"leased {self._key}")
        return await self._publish()

    def remember(self, value: bytes) -> None:
        """Replace the value that is put after a lost lease."""
        self._value = value

    def put_again(self) -> None:
        """Put the value again soon, because the key was deleted while its lease lives. Does nothing before `set` and after `remove`."""
        self._published = False

    async def remove(self) -> None:
        """Delete the key. If the store does not answer, the key disappears when its lease expires, which is not waited for."""
        if self._guard is not None:
            self._guard.cancel()
            with suppress(asyncio.CancelledError):
                await self._guard
            self._guard = None
        self._value = None
        lease, self._lease, self._held = self._lease, None, None
        if lease is not None and self._store.is_answering:
            with suppress(StoreError):
                await self._store.revoke(lease)

    async def _publish(self) -> int:
        async with self._writing:
            assert self._value is not None
            self._published = False
            if self._lease is None or self._lease.lost.is_set():
                self._lease = await self._store.grant(self._ttl_s)
            revision = await self._store.put(self._key, self._value, lease=self._lease)
            self._published, self._held = True, self._lease
            return revision

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(RETRY_PAUSE_S)
            lost = self._lease is None or self._lease.lost.is_set()
            if self._writing.locked() or (self._published and not lost):
                continue
            try:
                await self._publish()
                logger.info("key %s was put again", self._key)
            except StoreError as error:
                logger.debug("key %s cannot be put: %s", self._key, error)
