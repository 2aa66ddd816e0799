"""Provides the store of a single node: one SQLite file in a directory, with all entries in memory as well.

SQLite's write-ahead log brings checksums, fsync on commit, atomic transactions over several keys and recovery after
kill -9. Reads never touch the disk; a write returns after its fsync. Leases end with the process, so leased entries are
not written to the file. A sound file is opened without a write, so it can be opened on a full disk.
"""

import asyncio
import itertools
import sqlite3
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mesh.errors import StoreError
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
FORMAT_VERSION = 1
HISTORY_EVENTS = 10_000

SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, lease_id INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO counter VALUES ('revision', 1);
"""

Result = TypeVar("Result")


class EmbeddedStore:
    """Implements mesh.store.protocol.Store. `open` refuses a second process."""

    def __init__(self, directory: Path, *, history_events: int = HISTORY_EVENTS) -> None:
        self._path = directory / FILE_NAME
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedded-store")
        self._database: sqlite3.Connection | None = None
        self._entries: dict[str, Entry] = {}
        self._revision = 0
        self._history: deque[EntryPut | EntryDeleted] = deque(maxlen=history_events)
        self._history_from = 0  # the first revision whose events are all in the history
        self._watches: set[asyncio.Queue[tuple[WatchEvent, ...] | None]] = set()
        self._leases: dict[int, Lease] = {}
        self._lease_ids = itertools.count(1)
        self._writing = asyncio.Lock()
        self._closed = False

    async def open(self) -> None:
        self._entries, self._revision = await self._in_thread(self._open_database)
        self._history_from = self._revision + 1

    async def close(self) -> None:
        if self._closed:
            return
        async with self._writing:
            self._closed = True
            for queue in self._watches:
                queue.put_nowait(None)
            with suppress(StoreError):
                await self._in_thread(self._close_database)
        self._thread.shutdown(wait=True)

    @property
    def is_answering(self) -> bool:
        return not self._closed

    def silence_s(self) -> float:
        return 0.0

    async def get(self, key: str) -> Entry | None:
        self._check_open()
        return self._entries.get(key)

    async def get_prefix(self, prefix: str) -> Listing:
        self._check_open()
        return self._listing(prefix)

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
                lambda: ([], [Delete(entry.key) for entry in self._entries.values() if entry.lease_id == lease.id])
            )

    async def watch(self, prefix: str, from_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        self._check_open()
        queue: asyncio.Queue[tuple[WatchEvent, ...] | None] = asyncio.Queue()
        if from_revision is None or from_revision < self._history_from:
            queue.put_nowait((Relisted(self._listing(prefix)),))
        elif from_revision > self._revision + 1:
            queue.put_nowait((Relisted(self._listing(prefix), went_back=True),))
        else:
            queue.put_nowait(tuple(event for event in self._history if _revision_of(event) >= from_revision))
        self._watches.add(queue)
        try:
            while (batch := await queue.get()) is not None:
                for event in batch:
                    if isinstance(event, Relisted) or _key_of(event).startswith(prefix):
                        yield event
        finally:
            self._watches.discard(queue)

    async def _write(self, plan: Callable[[], tuple[Sequence[Compare], Sequence[Write]]]) -> tuple[TxnResult, int]:
        """Execute a write to its end, even if the caller is cancelled: memory and file must not differ."""
        return await asyncio.shield(asyncio.ensure_future(self._write_in_turn(plan)))

    async def _write_in_turn(
        self, plan: Callable[[], tuple[Sequence[Compare], Sequence[Write]]]
    ) -> tuple[TxnResult, int]:
        async with self._writing:
            self._check_open()
            compares, writes = plan()
            if not all(self._holds(compare) for compare in compares):
                current = tuple(self._entries.get(compare.key) for compare in compares)
                return TxnResult(succeeded=False, revision=self._revision, current=current), 0
            events = self._events(writes, self._revision + 1)
            if events:
                if any(self._is_durable(event) for event in events):
                    await self._in_thread(lambda: self._commit(events))
                self._apply(events)
            return TxnResult(succeeded=True, revision=self._revision), len(events)

    def _holds(self, compare: Compare) -> bool:
        entry = self._entries.get(compare.key)
        mod, create = (entry.mod_revision, entry.create_revision) if entry else (ABSENT, ABSENT)
        return compare.mod_revision in (None, mod) and compare.create_revision in (None, create)

    def _events(self, writes: Sequence[Write], revision: int) -> list[EntryPut | EntryDeleted]:
        events: list[EntryPut | EntryDeleted] = []
        for write in writes:
            old = self._entries.get(write.key)
            if isinstance(write, Put):
                if write.lease_id and write.lease_id not in self._leases:
                    raise StoreError(f"store: lease {write.lease_id} of {write.key} has ended")
                created = old.create_revision if old else revision
                events.append(EntryPut(Entry(write.key, write.value, created, revision, write.lease_id)))
            elif old is not None:
                events.append(EntryDeleted(write.key, revision))
        return events

    def _is_durable(self, event: EntryPut | EntryDeleted) -> bool:
        """Return whether the event changes the file."""
        old = self._entries.get(_key_of(event))
        return (old is not None and not old.lease_id) or (isinstance(event, EntryPut) and not event.entry.lease_id)

    def _apply(self, events: Sequence[EntryPut | EntryDeleted]) -> None:
        self._revision = _revision_of(events[0])
        for event in events:
            if len(self._history) == self._history.maxlen:
                self._history_from = _revision_of(self._history[0]) + 1
            self._history.append(event)
            if isinstance(event, EntryPut):
                self._entries[event.entry.key] = event.entry
            else:
                del self._entries[event.key]
        for queue in self._watches:
            queue.put_nowait(tuple(events))

    def _listing(self, prefix: str) -> Listing:
        found = sorted(
            (entry for entry in self._entries.values() if entry.key.startswith(prefix)), key=lambda entry: entry.key
        )
        return Listing(tuple(found), self._revision)

    def _open_database(self) -> tuple[dict[str, Entry], int]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # In autocommit mode, the sqlite3 module starts no transactions of its own.
        database = sqlite3.connect(self._path, isolation_level=None, timeout=0.0)
        try:
            database.execute("PRAGMA locking_mode=EXCLUSIVE")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT_VERSION):
                raise StoreError(f"store: {self._path} has format {version}; this version reads {FORMAT_VERSION}")
            damage = database.execute("PRAGMA quick_check").fetchone()[0]
            if damage != "ok":
                raise StoreError(f"store: {self._path} is damaged: {damage}")
            if version != FORMAT_VERSION:
                database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version={FORMAT_VERSION}; COMMIT;")
            rows = database.execute(
                "SELECT key, value, create_revision, mod_revision, lease_id FROM entry WHERE lease_id=0"
            )
            entries = {row[0]: Entry(*row) for row in rows}
            revision: int = database.execute("SELECT value FROM counter WHERE name='revision'").fetchone()[0]
        except BaseException:
            database.close()
            raise
        self._database = database
        return entries, revision

    def _commit(self, events: Sequence[EntryPut | EntryDeleted]) -> None:
        database = self._database
        if database is None:
            raise StoreError("store: not open")
        try:
            database.execute("BEGIN IMMEDIATE")
            for event in events:
                if isinstance(event, EntryPut) and not event.entry.lease_id:
                    entry = event.entry
                    row = (entry.key, entry.value, entry.create_revision, entry.mod_revision, entry.lease_id)
                    database.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?, ?)", row)
                else:
                    database.execute("DELETE FROM entry WHERE key=?", (_key_of(event),))
            database.execute("UPDATE counter SET value=? WHERE name='revision'", (_revision_of(events[0]),))
            database.execute("COMMIT")
        except sqlite3.Error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _close_database(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

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
