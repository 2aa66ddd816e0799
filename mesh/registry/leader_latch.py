"""Elects the pod that does the housekeeping by ModelMesh's rule: the pod whose key below `leaderLatch/` is the oldest."""

import asyncio
from contextlib import aclosing, suppress

from mesh.errors import StoreError
from mesh.store.leased_key import LeasedKey
from mesh.store.protocol import Entry, EntryDeleted, EntryPut, Relisted, Store


class LeaderLatch:
    """This pod's candidacy, and the candidacies of all pods, Java pods included. Keys are leased, so a dead pod's key disappears."""

    def __init__(self, store: Store, prefix: str, own_id: str, *, ttl_s: float) -> None:
        self._store = store
        self._prefix = prefix
        self._own_key = f"{prefix}_{own_id}"
        self._own = LeasedKey(store, self._own_key, ttl_s=ttl_s)
        self._has_joined = False
        self._created: dict[str, int] = {}  # by key: the revision that created it
        self._listed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float) -> None:
        """Watch the candidates. Raises StoreError if they cannot be listed in time."""
        self._task = asyncio.create_task(self._follow(), name=f"watch {self._prefix}")
        try:
            async with asyncio.timeout(timeout_s):
                await self._listed.wait()
        except TimeoutError:
            raise StoreError(f"store: {self._prefix} could not be listed within {timeout_s:g} s") from None

    async def join(self) -> None:
        """Become a candidate, once. Raises StoreError; the key is then put when the store is back."""
        if not self._has_joined:
            self._has_joined = True
            await self._own.set(b"")

    async def close(self) -> None:
        """Withdraw and stop watching."""
        await self._own.remove()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def is_leader(self) -> bool:
        return min(self._created, key=self._created.__getitem__, default=None) == self._own_key

    async def _follow(self) -> None:
        async with aclosing(self._store.watch(self._prefix)) as events:
            async for event in events:
                match event:
                    case EntryPut(entry):
                        self._add(entry)
                    case EntryDeleted(key):
                        self._created.pop(key, None)
                        if key == self._own_key:
                            self._own.put_again()
                    case Relisted(listing):
                        self._created.clear()
                        for entry in listing.entries:
                            self._add(entry)
                        if self._own_key not in self._created:
                            self._own.put_again()
                        self._listed.set()

    def _add(self, entry: Entry) -> None:
        self._created[entry.key] = entry.create_revision
