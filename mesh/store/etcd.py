"""Provides the store on etcd. Values are opaque bytes; keys are UTF-8 text."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from mesh.store.etcd_connection import EtcdConnection, Method
from mesh.store.etcd_lease import LeaseKeeper
from mesh.store.etcd_watch import PrefixWatch, encode_key, entry_of, prefix_range
from mesh.store.location import EtcdLocation
from mesh.store.protocol import Compare, Delete, Entry, Lease, Listing, Put, TxnResult, WatchEvent, Write
from wire import etcd_pb2 as pb

RANGE = Method("/etcdserverpb.KV/Range", pb.RangeResponse.FromString, repeatable=True)
PUT = Method("/etcdserverpb.KV/Put", pb.PutResponse.FromString)
DELETE = Method("/etcdserverpb.KV/DeleteRange", pb.DeleteRangeResponse.FromString)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnResponse.FromString)

_PAGE = 5000  # entries of a listing in one answer


class EtcdStore:
    """Implements mesh.store.protocol.Store. Belongs to the event loop in which it was opened."""

    def __init__(
        self,
        location: EtcdLocation,
        *,
        connect_timeout_s: float = 20.0,
        call_timeout_s: float = 3.5,
        reread: Callable[[], EtcdLocation] | None = None,
    ) -> None:
        self._connection = EtcdConnection(
            location, connect_timeout_s=connect_timeout_s, call_timeout_s=call_timeout_s, reread=reread
        )
        self._leases = LeaseKeeper(self._connection)
        self._watches: set[PrefixWatch] = set()

    async def open(self) -> None:
        await self._connection.open()

    async def close(self) -> None:
        await self._leases.close()
        await self._connection.close()

    @property
    def is_answering(self) -> bool:
        return self._connection.is_answering

    def silence_s(self) -> float:
        return max((watch.silence_s() for watch in self._watches), default=0.0)

    async def get(self, key: str) -> Entry | None:
        answer = await self._connection.call(RANGE, pb.RangeRequest(key=encode_key(key)))
        return entry_of(answer.kvs[0]) if answer.kvs else None

    async def get_prefix(self, prefix: str) -> Listing:
        """List in pages of one revision. Raises StoreError if that revision is compacted meanwhile."""
        key, end = prefix_range(prefix)
        entries: list[Entry] = []
        revision, more = 0, True
        while more:
            request = pb.RangeRequest(key=key, range_end=end, limit=_PAGE, revision=revision)
            answer = await self._connection.call(RANGE, request)
            revision = revision or answer.header.revision
            entries += (entry_of(kv) for kv in answer.kvs)
            more = answer.more
            if more:
                key = answer.kvs[-1].key + b"\0"
        return Listing(tuple(entries), revision)

    async def put(self, key: str, value: bytes, *, lease: Lease | None = None) -> int:
        request = pb.PutRequest(key=encode_key(key), value=value, lease=lease.id if lease else 0)
        with self._leases.noticing_lost([request.lease]):
            return (await self._connection.call(PUT, request)).header.revision

    async def delete(self, key: str) -> bool:
        return (await self._connection.call(DELETE, pb.DeleteRangeRequest(key=encode_key(key)))).deleted > 0

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> TxnResult:
        request = pb.TxnRequest(
            compare=[condition for compare in compares for condition in _conditions(compare)],
            success=[_operation(write) for write in writes],
            failure=[pb.RequestOp(request_range=pb.RangeRequest(key=encode_key(compare.key))) for compare in compares],
        )
        with self._leases.noticing_lost(write.lease_id for write in writes if isinstance(write, Put)):
            answer = await self._connection.call(TXN, request)
        if answer.succeeded:
            return TxnResult(succeeded=True, revision=answer.header.revision)
        ranges = [response.response_range for response in answer.responses]
        current = tuple(entry_of(found.kvs[0]) if found.kvs else None for found in ranges)
        return TxnResult(succeeded=False, revision=answer.header.revision, current=current)

    async def grant(self, ttl_s: float) -> Lease:
        return await self._leases.grant(ttl_s)

    async def revoke(self, lease: Lease) -> None:
        await self._leases.revoke(lease)

    async def watch(self, prefix: str, from_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        watch = PrefixWatch(self._connection, self.get_prefix, prefix, from_revision)
        self._watches.add(watch)
        try:
            async with aclosing(watch.events()) as events:
                async for event in events:
                    yield event
                    del event  # a listing must not stay in memory until the next event
        finally:
            self._watches.discard(watch)


def _conditions(compare: Compare) -> list[pb.Compare]:
    key = encode_key(compare.key)
    found = []
    if compare.mod_revision is not None:
        found.append(
            pb.Compare(result=pb.Compare.EQUAL, target=pb.Compare.MOD, key=key, mod_revision=compare.mod_revision)
        )
    if compare.create_revision is not None:
        found.append(
            pb.Compare(
                result=pb.Compare.EQUAL, target=pb.Compare.CREATE, key=key, create_revision=compare.create_revision
            )
        )
    return found


def _operation(write: Write) -> pb.RequestOp:
    match write:
        case Put(key, value, lease_id):
            return pb.RequestOp(request_put=pb.PutRequest(key=encode_key(key), value=value, lease=lease_id))
        case Delete(key):
            return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=encode_key(key)))
