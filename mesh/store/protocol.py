"""The one store that the mesh writes to, as a Protocol: etcd's model (revisions, compare-and-set, leases, watches) with values as bytes.

Both implementations pass the same contract tests.

Revisions: one counter for the whole store; every transaction that writes takes the next number, and all its writes
carry it. Failures: `StoreError` means that nothing was changed, `StoreUncertain` that the write may or may not have
happened.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ABSENT = 0
"""The modification revision of a key that does not exist; comparing with it means "only if absent"."""


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries under a prefix, sorted by key, as they were at `revision`."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds if each revision given equals the key's; an absent key's revisions are 0."""

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
    """Deleting an absent key is no error and writes nothing."""

    key: str


Write = Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`revision`: the store's after the transaction. `current`: on failure, the compared keys in order as they are (None: absent)."""

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
    """Everything under the prefix is now exactly this; what isn't in it is gone.

    Comes first if a watch was begun without a revision, and whenever events were lost for good (compaction, a store restored from
    a backup). `went_back`: the store's revisions are lower than those seen before, so what was known counts for nothing.
    """

    listing: Listing
    went_back: bool = False


WatchEvent = EntryPut | EntryDeleted | Relisted


@dataclass(eq=False)
class Lease:
    """A time-to-live that the store keeps renewing by itself until it is revoked, the store is closed or `lost` is set."""

    id: int
    ttl_s: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Store(Protocol):
    async def open(self) -> None:
        """Connect, or read what is on disk. Raises StoreError if that does not work within the store's connect timeout."""

    async def close(self) -> None:
        """Leases stop being renewed, watches end. Idempotent."""

    async def get(self, key: str) -> Entry | None: ...

    async def get_prefix(self, prefix: str) -> Listing: ...

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        """Returns the revision; once it returned, the value is durable."""

    async def delete(self, key: str) -> bool:
        """Returns whether the key existed."""

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        """All writes if every compare holds, else none. No key may be written twice."""

    async def grant(self, ttl_s: float) -> Lease:
        """A new lease, renewed until revoked. Keys put under it vanish when it ends."""

    async def revoke(self, lease: Lease) -> None:
        """End it and delete its keys, now. An unknown or ended lease: nothing happens."""

    def watch(self, prefix: str, from_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Events from `from_revision` on, in order, each once; without it a `Relisted` first, then what follows it.

        Survives reconnects and restarts of the store; ends only when closed. Events of one revision are never torn apart by a reconnect.
        """
