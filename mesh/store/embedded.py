"""Provides the store of a single node: one SQLite file in a directory.

SQLite's write-ahead log brings checksums, fsync on commit, atomic transactions over several keys and recovery after
kill -9. A write returns after its fsync. Values are read from the file and not kept in memory, because the tables of the
registry keep them decoded. Leases end with the process, so leased entries are in memory only. A sound file is opened
without a write, so it can be opened on a full disk.
"""

import asyncio
import itertools
import sqlite3
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mesh.errors import StoreError
from mesh.store.entry_file import EntryFile
from mesh.store.protocol import (
    ABSENT,
    Compare,
    Delete,
    Entry,
    EntryDeleted,
    EntryPut,
    Lease,
    Listing,
    Put,
    Relisted,
    TxnResult,
    WatchEvent,
    Write,
)

FILE_NAME = "registry.sqlite3"
HISTORY_EVENTS = 10_000

Result = TypeVar("Result")


class EmbeddedStore:
    """Implements mesh.store.protocol.Store. `open` refuses a second process."""

    def __init__(self, directory: Path, *, history_events: int = HISTORY_EVENTS) -> None:
        self._path = directory / FILE_NAME
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedded-store")
        self._file = EntryFile(self._path)
        self._leased: dict[str, Entry] = {}  # by key; the file has no entry with such a key
        self._revision = 0
        self._history: deque[EntryPut | EntryDeleted] = deque(maxlen=history_events)
        self._history_from = 0  # the first revision whose events are all in the history
        self._watches: set[asyncio.Queue[tuple[WatchEvent, ...] | None]] = set()
        self._leases: dict[int, Lease] = {}
        self._lease_ids = itertools.count(1)
        self._writing = asyncio.Lock()
        self._closed = False

    async def open(self) -> None:
        self._revision = await self._in_thread(self._file.open)
        self._history_from = self._revision + 1

    async def close(self) -> None:
        if self._closed:
            return
        async with self._writing:
            self._closed = True
            for queue in self._watches:
                queue.put_nowait(None)
            with suppress(StoreError):
                await self._in_thread(self._file.close)
        self._thread.shutdown(wait=True)

    @property
    def is_answering(self) -> bool:
        return not self._closed

    def silence_s(self) -> float:
        return 0.0

    async def get(self, key: str) -> Entry | None:
        self._check_open()
        return (await self._known((key,))).get(key)

    async def get_prefix(self, prefix: str) -> Listing:
        async with self._writing:
            self._check_open()
            return await self._listing(prefix)

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        return (await self.txn([], [Put(key, value, lease.id if lease else 0)])).revision

    async def delete(self, key: str) -> bool:
        return (await self._write(lambda: ([], [Delete(key)])))[1] > 0

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        if len({write.key for write in writes}) < len(writes):
            raise StoreError("store: a transaction writes one key twice")
        return (await self._write(lambda: (compares, writes)))[0]

    async def grant(self, ttl_s: float) -> Lease:
        self._check_open()
        lease = Lease(next(self._lease_ids), ttl_s)
        self._leases[lease.id] = lease
        return lease

    async def revoke(self, lease: Lease) -> None:
        if self._leases.pop(lease.id, None) is not None:
            # The lease's keys are determined when the write is executed.
            await self._write(
                lambda: ([], [Delete(entry.key) for entry in self._leased.values() if entry.lease_id == lease.id])
            )

    async def watch(self, prefix: str, from_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        queue: asyncio.Queue[tuple[WatchEvent, ...] | None] = asyncio.Queue()
        async with self._writing:
            self._check_open()
            queue.put_nowait(await self._first_events(prefix, from_revision))
            self._watches.add(queue)
        try:
            while (batch := await queue.get()) is not None:
                for event in batch:
                    if isinstance(event, Relisted) or _key_of(event).startswith(prefix):
                        yield event
                    del event  # a listing of 100,000 entries must not stay in memory until the next event
                del batch
        finally:
            self._watches.discard(queue)

    async def _first_events(self, prefix: str, from_revision: int | None) -> tuple[WatchEvent, ...]:
        if from_revision is None or from_revision < self._history_from:
            return (Relisted(await self._listing(prefix)),)
        if from_revision > self._revision + 1:
            return (Relisted(await self._listing(prefix), went_back=True),)
        return tuple(event for event in self._history if _revision_of(event) >= from_revision)

    async def _write(self, plan: Callable[[], tuple[Sequence[Compare], Sequence[Write]]]) -> tuple[TxnResult, int]:
        """Execute a write to its end, even if the caller is cancelled: memory and file must not differ."""
        return await asyncio.shield(asyncio.ensure_future(self._write_in_turn(plan)))

    async def _write_in_turn(
        self, plan: Callable[[], tuple[Sequence[Compare], Sequence[Write]]]
    ) -> tuple[TxnResult, int]:
        async with self._writing:
            self._check_open()
            compares, writes = plan()
            known = await self._known({item.key for item in (*compares, *writes)})
            if not all(_holds(compare, known.get(compare.key)) for compare in compares):
                current = tuple(known.get(compare.key) for compare in compares)
                return TxnResult(succeeded=False, revision=self._revision, current=current), 0
            revision = self._revision + 1
            events = self._events(writes, known, revision)
            if events:
                if any(_is_durable(event, known.get(_key_of(event))) for event in events):
                    await self._in_thread(lambda: self._file.commit(events, revision))
                self._apply(events)
            return TxnResult(succeeded=True, revision=self._revision), len(events)

    async def _known(self, keys: Iterable[str]) -> dict[str, Entry]:
        """Return the entries that exist, by key."""
        in_file = [key for key in keys if key not in self._leased]
        found = await self._in_thread(lambda: self._file.get(in_file)) if in_file else {}
        return found | {key: self._leased[key] for key in keys if key in self._leased}

    def _events(
        self, writes: Sequence[Write], known: Mapping[str, Entry], revision: int
    ) -> list[EntryPut | EntryDeleted]:
        events: list[EntryPut | EntryDeleted] = []
        for write in writes:
            old = known.get(write.key)
            if isinstance(write, Put):
                if write.lease_id and write.lease_id not in self._leases:
                    raise StoreError(f"store: lease {write.lease_id} of {write.key} has ended")
                created = old.create_revision if old else revision
                events.append(EntryPut(Entry(write.key, write.value, created, revision, write.lease_id)))
            elif old is not None:
                events.append(EntryDeleted(write.key, revision))
        return events

    def _apply(self, events: Sequence[EntryPut | EntryDeleted]) -> None:
        self._revision = _revision_of(events[0])
        for event in events:
            if len(self._history) == self._history.maxlen:
                self._history_from = _revision_of(self._history[0]) + 1
            self._history.append(event)
            if isinstance(event, EntryPut) and event.entry.lease_id:
                self._leased[event.entry.key] = event.entry
            else:
                self._leased.pop(_key_of(event), None)
        for queue in self._watches:
            queue.put_nowait(tuple(events))

    async def _listing(self, prefix: str) -> Listing:
        entries = await self._in_thread(lambda: self._file.under(prefix))
        leased = [entry for entry in self._leased.values() if entry.key.startswith(prefix)]
        if leased:
            entries = sorted((*entries, *leased), key=lambda entry: entry.key)
        return Listing(tuple(entries), self._revision)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise StoreError(f"store: {self._path} is in use by another process") from None
            raise StoreError(f"store: {self._path}: {error}") from None
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"store: {self._path}: {error}") from None

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("store: closed")


def _revision_of(event: EntryPut | EntryDeleted) -> int:
    return event.entry.mod_revision if isinstance(event, EntryPut) else event.mod_revision


def _key_of(event: EntryPut | EntryDeleted) -> str:
    return event.entry.key if isinstance(event, EntryPut) else event.key


def _holds(compare: Compare, entry: Entry | None) -> bool:
    mod, create = (entry.mod_revision, entry.create_revision) if entry else (ABSENT, ABSENT)
    return compare.mod_revision in (None, mod) and compare.create_revision in (None, create)


def _is_durable(event: EntryPut | EntryDeleted, old: Entry | None) -> bool:
    """Return whether the event changes the file. `old`: the entry before it."""
    return (old is not None and not old.lease_id) or (isinstance(event, EntryPut) and not event.entry.lease_id)
