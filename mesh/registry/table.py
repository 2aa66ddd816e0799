"""Provides one kind of record under one prefix of the store: watched, cached, and changed by compare-and-set.

Reads come from the cache, which the watch fills and own writes enter at once, so reads work while the store is
unreachable. Listeners are called once for each change, of this pod or another one.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from typing import Generic

import msgspec

from mesh.errors import StoreError, StoreUncertain
from mesh.registry.mass_loss import is_mass_loss
from mesh.registry.records import R, decode_record, encode_record
from mesh.store.protocol import (
    ABSENT,
    Compare,
    Delete,
    Entry,
    EntryDeleted,
    EntryPut,
    Listing,
    Put,
    Relisted,
    Store,
    WatchEvent,
    Write,
)

logger = logging.getLogger(__name__)

Listener = Callable[[str, R | None, R | None], None]
"""Called with the id, the old record and the new record. None stands for an absent record."""


class Versioned(msgspec.Struct, Generic[R], frozen=True, gc=False):
    """A record at the revision at which it was read, None if it was absent. Changes are conditional on that revision.

    It is in no reference cycle, so the garbage collector need not look at the 100,000 of a large mesh.
    """

    record: R | None
    create_revision: int = ABSENT
    mod_revision: int = ABSENT


class Table(Generic[R]):
    def __init__(self, store: Store, prefix: str, kind: type[R], *, keep_lost_s: float = 0.0) -> None:
        """`keep_lost_s`: how long records that disappeared in a mass are kept; infinite until they return or `accept_loss` is called."""
        self._store = store
        self._keep_lost_s = keep_lost_s
        self._lost: set[str] = set()  # kept, although they disappeared from the store
        self._prefix = prefix
        self._kind = kind
        self._cache: dict[str, Versioned[R]] = {}
        self._absent_at: dict[str, int] = {}  # deleted at a revision that the watch has not reached yet
        self._watched_revision = ABSENT  # the revision that the watch has reached
        self._listeners: list[Listener[R]] = []
        self._listed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_unconfirmed_deletions(self) -> int:
        """Deletions that a call has reported and the watch has not reached yet."""
        return len(self._absent_at)

    async def start(self, timeout_s: float = 20.0) -> None:
        """Start watching and return after the first listing. Raises StoreError after `timeout_s`."""
        self._task = asyncio.create_task(self._follow(), name=f"watch {self._prefix}")
        try:
            async with asyncio.timeout(timeout_s):
                await self._listed.wait()
        except TimeoutError:
            await self.close()
            raise StoreError(f"store: {self._prefix} could not be listed within {timeout_s} s") from None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    @property
    def num_lost(self) -> int:
        """The number of cached records that disappeared from the store in a mass."""
        return len(self._lost)

    def accept_loss(self) -> None:
        """Drop the records that disappeared from the store, as an operator has confirmed that they were deleted on purpose."""
        lost, self._lost = self._lost, set()
        for record_id in sorted(lost):
            self._drop(record_id, self._watched_revision)

    def check_changeable(self) -> None:
        """Raise StoreError if changes are refused because records disappeared in a mass."""
        if self._lost:
            raise StoreError(
                f"store: {len(self._lost)} of {len(self._cache)} records of {self._prefix} disappeared at once, so this pod keeps serving"
                " them and refuses changes; restore the store, or confirm the loss with POST /admin/v1/registry/accept-loss"
            )

    def get(self, record_id: str) -> R | None:
        known = self._cache.get(record_id)
        return known.record if known else None

    def items(self) -> list[tuple[str, R]]:
        """Return the cached records with their ids, sorted by id."""
        return sorted((record_id, known.record) for record_id, known in self._cache.items() if known.record is not None)

    def oldest(self) -> str | None:
        """Return the id of the record that was created first. All pods come to the same result."""
        return min(self._cache, key=lambda record_id: self._cache[record_id].create_revision, default=None)

    def __len__(self) -> int:
        return len(self._cache)

    def __contains__(self, record_id: str) -> bool:
        return record_id in self._cache

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._cache))

    async def find(self, record_id: str) -> R | None:
        """Return a record from the cache, else from the store: another pod may have just written it."""
        return self.get(record_id) or await self.refresh(record_id)

    async def refresh(self, record_id: str) -> R | None:
        """Return a record as the store has it, or from the cache while the store does not answer."""
        if self._store.is_answering and record_id not in self._lost:
            try:
                return (await self.read(record_id)).record
            except StoreError as error:
                logger.debug("record %s comes from the cache: %s", record_id, error)
        return self.get(record_id)

    async def read(self, record_id: str) -> Versioned[R]:
        """Read a record from the store. Raises StoreError, also for a record that cannot be decoded."""
        entry = await self._store.get(self._prefix + record_id)
        if entry is None:
            return Versioned(None)
        found = self._decode(entry)
        self._absorb_ahead_of_watch(record_id, found)
        return found

    async def read_after_lost_answer(self, record_id: str) -> Versioned[R]:
        """Like read, after a write whose answer was lost. Raises StoreUncertain if the store does not answer."""
        try:
            return await self.read(record_id)
        except StoreError as error:
            raise StoreUncertain(error.message) from None

    async def update(self, record_id: str, change: Callable[[R | None], R | None]) -> R | None:
        """Change, create or delete one record, and return the new one. Concurrent changes by other pods are kept.

        `change` may be called several times, and on its own result if the store's answer was lost, so it must be idempotent. Returning the
        given record unchanged writes nothing.
        """
        self.check_changeable()
        known = self._cache.get(record_id) or await self.read(record_id)
        answer_lost = False
        while True:
            new = change(known.record)
            if new == known.record:
                return new
            write, compare = self.stage(record_id, known, new)
            try:
                result = await self._store.txn([compare], [write])
            except StoreUncertain:
                if answer_lost:
                    raise
                answer_lost = True
                known = await self.read_after_lost_answer(record_id)
                continue
            if result.succeeded:
                self.absorb_write(record_id, known, new, result.revision)
                return new
            known = self.absorb_conflict(record_id, result.current[0], result.revision)

    def stage(self, record_id: str, known: Versioned[R], new: R | None) -> tuple[Write, Compare]:
        """Return the write and its condition for a transaction over several tables. Call `absorb_write` or `absorb_conflict` afterwards."""
        key = self._prefix + record_id
        return Delete(key) if new is None else Put(key, encode_record(new)), self.expect(record_id, known)

    def expect(self, record_id: str, known: Versioned[R]) -> Compare:
        return Compare(self._prefix + record_id, mod_revision=known.mod_revision)

    def absorb_write(self, record_id: str, known: Versioned[R], new: R | None, revision: int) -> None:
        if new is None:
            self._absorb_absence(record_id, revision)
        else:
            self._absorb_ahead_of_watch(record_id, Versioned(new, known.create_revision or revision, revision))

    def absorb_conflict(self, record_id: str, current: Entry | None, revision: int) -> Versioned[R]:
        if current is None:
            self._absorb_absence(record_id, revision)
            return Versioned(None)
        found = self._decode(current)
        self._absorb_ahead_of_watch(record_id, found)
        return found

    def listen(self, listener: Listener[R]) -> Callable[[], None]:
        """Add a listener, and return the function that removes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def until(self, record_id: str, holds: Callable[[R | None], bool]) -> R | None:
        """Wait until `holds` is true for the cached record, and return that record."""
        if holds(self.get(record_id)):
            return self.get(record_id)
        done: asyncio.Future[R | None] = asyncio.get_running_loop().create_future()

        def look(changed_id: str, _: R | None, new: R | None) -> None:
            if changed_id == record_id and not done.done() and holds(new):
                done.set_result(new)

        stop = self.listen(look)
        try:
            return await done
        finally:
            stop()

    async def _follow(self) -> None:
        async with aclosing(self._store.watch(self._prefix)) as events:
            async for event in events:
                self._take(event)
                # A listing of 100,000 entries must not stay in memory until the next event.
                del event

    def _take(self, event: WatchEvent) -> None:
        match event:
            case EntryPut(entry):
                self._set_watched(entry.mod_revision)
                self._absorb_put(entry)
            case EntryDeleted(key, revision):
                self._set_watched(revision)
                self._drop(key.removeprefix(self._prefix), revision)
            case Relisted(listing, went_back):
                self._relist(listing, went_back)
                self._listed.set()

    def _relist(self, listing: Listing, went_back: bool) -> None:
        listed = {entry.key.removeprefix(self._prefix) for entry in listing.entries}
        if went_back:
            # Revisions cannot be compared with the known ones, so drop those. Listeners are called for real differences only.
            self._absent_at.clear()
            self._cache = {record_id: Versioned(known.record) for record_id, known in self._cache.items()}
        self._lost &= self._cache.keys()
        missing = self._cache.keys() - listed
        if self._keep_lost_s and (self._lost or is_mass_loss(len(self._cache), len(missing), went_back=went_back)):
            self._keep_lost(missing - self._lost)
        else:
            for record_id in missing:
                self._drop(record_id, listing.revision)
        self._set_watched(listing.revision)
        for entry in listing.entries:
            self._absorb_put(entry)

    def _keep_lost(self, missing: set[str]) -> None:
        if not missing:
            return
        self._lost |= missing
        logger.error(
            "%d of %d records of %s disappeared from the store at once; they are kept",
            len(missing),
            len(self._cache),
            self._prefix,
        )
        if math.isfinite(self._keep_lost_s):
            asyncio.get_running_loop().call_later(self._keep_lost_s, self.accept_loss)

    def _set_watched(self, revision: int) -> None:
        self._watched_revision = revision
        if self._absent_at:
            self._absent_at = {record_id: at for record_id, at in self._absent_at.items() if at > revision}

    def _absorb_ahead_of_watch(self, record_id: str, found: Versioned[R]) -> None:
        """Cache the result of a call that is newer than the watch. If the watch is past that revision, its own state is newer."""
        if found.mod_revision > self._watched_revision:
            self._absorb(record_id, found)

    def _absorb_absence(self, record_id: str, revision: int) -> None:
        """Drop a record that a call found absent. Events that are still to come may contain its earlier versions."""
        if revision > self._watched_revision:
            self._absent_at[record_id] = revision
        self._drop(record_id, revision)

    def _absorb_put(self, entry: Entry) -> None:
        try:
            self._absorb(entry.key.removeprefix(self._prefix), self._decode(entry))
        except StoreError as error:
            logger.warning("%s; the record is ignored", error)

    def _absorb(self, record_id: str, new: Versioned[R]) -> None:
        if record_id in self._lost:
            self._lost.discard(record_id)
            if not self._lost:
                logger.warning("all records of %s are in the store again", self._prefix)
        old = self._cache.get(record_id)
        if new.mod_revision > max(old.mod_revision if old else ABSENT, self._absent_at.get(record_id, ABSENT)):
            self._cache[record_id] = new
            self._notify(record_id, old.record if old else None, new.record)

    def _drop(self, record_id: str, revision: int) -> None:
        old = self._cache.get(record_id)
        if old is not None and old.mod_revision <= revision:
            del self._cache[record_id]
            self._lost.discard(record_id)
            self._notify(record_id, old.record, None)

    def _notify(self, record_id: str, old: R | None, new: R | None) -> None:
        if old == new:
            return
        for listener in tuple(self._listeners):
            try:
                listener(record_id, old, new)
            except Exception:
                logger.exception("a listener of %s failed at %s", self._prefix, record_id)

    def _decode(self, entry: Entry) -> Versioned[R]:
        created, changed = _copied(entry.create_revision), _copied(entry.mod_revision)
        try:
            # Most records are never changed: their two revisions are one object.
            return Versioned(
                decode_record(self._kind, entry.value), changed if created == changed else created, changed
            )
        except msgspec.MsgspecError as error:
            raise StoreError(f"store: {entry.key} holds no {self._kind.__name__}: {error}") from None


def _copied(revision: int) -> int:
    """Return the number as another object. Each one of a listing that stayed would keep a page of the listing's memory from being freed."""
    return revision + 0
