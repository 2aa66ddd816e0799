"""Defines the store of the mesh as a Protocol: etcd's model (revisions, compare-and-set, leases, watches) with values as bytes.

Both implementations pass the same contract tests.

The store has one revision counter. Each transaction that writes takes the next number for all its writes. `StoreError`
means that nothing was changed, `StoreUncertain` that a write may have been applied.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ABSENT = 0
"""The modification revision of an absent key. A comparison with it means "only if absent"."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries under a prefix at `revision`, sorted by key."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds if each given revision equals that of the key. The revisions of an absent key are 0."""

    key: str
    mod_revision: int | None = None
    create_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Deletes a key. Without the key, nothing is written."""

    key: str


Write = Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`revision`: of the store after the transaction. `current`: after a failure, the compared entries in order, None if absent."""

    succeeded: bool
    revision: int
    current: tuple[Entry | None, ...] = ()


@dataclass(frozen=True, slots=True)
class EntryPut:
    entry: Entry


@dataclass(frozen=True, slots=True)
class EntryDeleted:
    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Relisted:
    """The complete content under the prefix. Keys that are not in it do not exist.

    It is the first event of a watch without a revision, and it replaces events that are not available (after a compaction, or a restore
    from a backup). `went_back`: the revisions of the store are lower than those seen before, so earlier revisions are void.
    """

    listing: Listing
    went_back: bool = False


WatchEvent = EntryPut | EntryDeleted | Relisted


@dataclass(eq=False)
class Lease:
    """A time to live that the store renews until the lease is revoked, the store is closed, or `lost` is set."""

    id: int
    ttl_s: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Store(Protocol):
    async def open(self) -> None:
        """Connect, or read what is on disk. Raises StoreError if that does not work within the store's connect timeout."""

    async def close(self) -> None:
        """End all watches and stop renewing leases; idempotent."""

    @property
    def is_answering(self) -> bool:
        """Whether the last call or watch got an answer. While this is False, calls are likely to time out."""

    def silence_s(self) -> float:
        """Return the seconds since the store last answered the watch that has waited longest; 0 for a store in this process."""

    async def get(self, key: str) -> Entry | None: ...

    async def get_prefix(self, prefix: str) -> Listing: ...

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Put a value and return its revision. The value is durable when this returns."""

    async def delete(self, key: str) -> bool:
        """Delete a key, and return whether it existed."""

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        """Apply all writes if every compare holds, else none. No key may be written twice."""

    async def grant(self, ttl_s: float) -> Lease:
        """Return a new lease, which is renewed until it is revoked. Its keys disappear when it ends."""

    async def revoke(self, lease: Lease) -> None:
        """End a lease and delete its keys. Does nothing for an unknown or ended lease."""

    def watch(self, prefix: str, from_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Yield the events from `from_revision` on, in order and each once; without it, first a `Relisted`, then the events that follow it.

        The watch survives reconnects and restarts of the store, and ends when the store is closed. A reconnect never splits the events of one
        revision.
        """
