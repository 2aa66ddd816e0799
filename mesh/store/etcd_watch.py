"""Watches a prefix of etcd through broken streams, restarts, compaction and restored backups.

The position is always the mod_revision of the last event + 1. While etcd catches a watch up, the revision in the headers
of its answers is ahead of the events, and in some versions that of progress answers too. Resuming from there would
lose events.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress

from mesh.errors import StoreError
from mesh.store.etcd_connection import EtcdConnection, Method, Stream
from mesh.store.protocol import Entry, EntryDeleted, EntryPut, Listing, Relisted, WatchEvent
from wire import etcd_pb2 as pb

logger = logging.getLogger(__name__)

WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchResponse.FromString)

PROGRESS_INTERVAL_S = 3.0
SILENCE_TIMEOUT_S = 8.0
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
_MASS_DELETION = 10  # deletions in one revision, which no operation of the mesh makes: the prefix is listed again

ListPrefix = Callable[[str], Awaitable[Listing]]


class _HistoryLost(Exception):
    """The events after the position are not available. `went_back`: the revisions of the store are lower than those seen before."""

    def __init__(self, *, went_back: bool) -> None:
        super().__init__()
        self.went_back = went_back


class PrefixWatch:
    """Watches one prefix. `next_revision` None begins with a listing."""

    def __init__(
        self, connection: EtcdConnection, list_prefix: ListPrefix, prefix: str, next_revision: int | None
    ) -> None:
        self._connection = connection
        self._list_prefix = list_prefix
        self._prefix = prefix
        self._next = next_revision
        self._went_back = False
        # The store was replaced before. If it is restored next, its history holds this position and is another one than that seen so far.
        self._doubts_history = False
        self._cluster_id: int | None = None
        self._pause_s = FIRST_PAUSE_S
        self._heard_at_s = asyncio.get_running_loop().time()

    def silence_s(self) -> float:
        """Return the seconds since etcd last answered this watch."""
        return asyncio.get_running_loop().time() - self._heard_at_s

    async def events(self) -> AsyncGenerator[WatchEvent, None]:
        """Yield events until the connection is closed."""
        while True:
            try:
                if self._next is None:
                    yield await self._relist()
                assert self._next is not None
                async with aclosing(self._one_stream(self._next)) as events:
                    async for event in events:
                        yield event
            except _HistoryLost as lost:
                logger.info("events of %s after revision %s are gone; listing again", self._prefix, self._next)
                self._next, self._went_back = None, lost.went_back
                self._doubts_history = self._doubts_history or lost.went_back
            except StoreError as error:
                if self._connection.closed:
                    return
                if self._doubts_history:
                    self._next = None
                first_of_many = self._pause_s == FIRST_PAUSE_S
                logger.log(
                    logging.WARNING if first_of_many else logging.DEBUG, "watch of %s broken: %s", self._prefix, error
                )
                await asyncio.sleep(self._pause_s)
                self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    async def _relist(self) -> Relisted:
        listing = await self._list_prefix(self._prefix)
        self._heard_at_s = asyncio.get_running_loop().time()
        self._next = listing.revision + 1
        went_back, self._went_back = self._went_back, False
        return Relisted(listing, went_back)

    async def _one_stream(self, start_revision: int) -> AsyncGenerator[WatchEvent, None]:
        stream = await self._connection.stream(WATCH)
        key, end = prefix_range(self._prefix)
        asking = asyncio.create_task(self._request_progress(stream), name=f"watch of {self._prefix}: progress")
        try:
            create = pb.WatchCreateRequest(key=key, range_end=end, start_revision=start_revision, progress_notify=True)
            await self._connection.write(stream, pb.WatchRequest(create_request=create))
            while True:
                answer = await self._connection.read(stream)
                self._heard_at_s = asyncio.get_running_loop().time()
                if answer.compact_revision:
                    raise _HistoryLost(went_back=False)
                if answer.canceled:
                    # Some versions report an expired token as a missing permission.
                    await self._connection.reauthenticate()
                    raise StoreError(f"store: etcd refused to watch {self._prefix}: {answer.cancel_reason}")
                if answer.created:
                    await self._check_same_store(answer.header, start_revision)
                    self._pause_s = FIRST_PAUSE_S
                    continue
                if _is_mass_deletion(answer.events):
                    raise _HistoryLost(went_back=False)
                for event in answer.events:
                    yield _event(event)
                if answer.events:
                    self._next = answer.events[-1].kv.mod_revision + 1
        finally:
            asking.cancel()
            stream.cancel()

    async def _request_progress(self, stream: Stream[pb.WatchResponse]) -> None:
        """Request progress regularly and abandon a silent stream. A member that hangs keeps its connections, and gRPC pings too rarely."""
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        with suppress(StoreError):
            while loop.time() - max(begun_s, self._heard_at_s) < SILENCE_TIMEOUT_S:
                await asyncio.sleep(PROGRESS_INTERVAL_S)
                await self._connection.write(stream, pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
        self._connection.abandon(stream)

    async def _check_same_store(self, header: pb.ResponseHeader, start_revision: int) -> None:
        """Raise _HistoryLost if the store was replaced or restored: it would send nothing until it reached this position again."""
        known, self._cluster_id = self._cluster_id, header.cluster_id
        if known not in (None, header.cluster_id):
            raise _HistoryLost(went_back=True)
        # A member that lags behind its leader shows an old revision, too. Only a linearizable read decides.
        if (
            header.revision < start_revision - 1
            and (await self._list_prefix(self._prefix)).revision < start_revision - 1
        ):
            raise _HistoryLost(went_back=True)


def prefix_range(prefix: str) -> tuple[bytes, bytes]:
    """Return etcd's [key, range_end) for all keys with this prefix. UTF-8 has no byte 0xff, so the last byte can be incremented."""
    key = encode_key(prefix)
    return (key, key[:-1] + bytes([key[-1] + 1])) if key else (b"\0", b"\0")


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def entry_of(kv: pb.KeyValue) -> Entry:
    return Entry(kv.key.decode("utf-8", "surrogateescape"), kv.value, kv.create_revision, kv.mod_revision, kv.lease)


def _is_mass_deletion(events: Sequence[pb.Event]) -> bool:
    deleted = Counter(event.kv.mod_revision for event in events if event.type == pb.Event.DELETE)
    return max(deleted.values(), default=0) >= _MASS_DELETION


def _event(event: pb.Event) -> WatchEvent:
    if event.type == pb.Event.DELETE:
        return EntryDeleted(event.kv.key.decode("utf-8", "surrogateescape"), event.kv.mod_revision)
    return EntryPut(entry_of(event.kv))
