"""Keeps leases alive on one stream.

A lease is lost when etcd reports its end, or when its time has passed without an answer.
"""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from mesh.errors import StoreError, StoreRefused
from mesh.store.etcd_connection import EtcdConnection, Method, Stream
from mesh.store.protocol import Lease
from wire import etcd_pb2 as pb

logger = logging.getLogger(__name__)

GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse.FromString, repeatable=True)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse.FromString, repeatable=True)
KEEP_ALIVE = Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse.FromString)

_NO_LEASE = "NOT_FOUND"  # etcd's answer to a write or a revocation under a lease that it does not have
RENEWALS_PER_TTL = 4
RECONNECT_PAUSE_S = 0.2


@dataclass(slots=True)
class _LeaseState:
    lease: Lease
    expires_at_s: float  # on the loop's clock, from before the request was sent: never later than etcd's expiry


class LeaseKeeper:
    def __init__(self, connection: EtcdConnection) -> None:
        self._connection = connection
        self._leases: dict[int, _LeaseState] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def grant(self, ttl_s: float) -> Lease:
        sent_at_s = asyncio.get_running_loop().time()
        answer = await self._connection.call(GRANT, pb.LeaseGrantRequest(TTL=max(1, round(ttl_s))))
        # etcd may grant more than the requested time (its minimum is about two seconds).
        lease = Lease(id=answer.ID, ttl_s=float(answer.TTL))
        self._leases[lease.id] = _LeaseState(lease, sent_at_s + lease.ttl_s)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="etcd-lease-keeper")
        self._wake.set()
        return lease

    async def revoke(self, lease: Lease) -> None:
        self._leases.pop(lease.id, None)
        try:
            await self._connection.call(REVOKE, pb.LeaseRevokeRequest(ID=lease.id))
        except StoreRefused as error:
            if error.status != _NO_LEASE:
                raise

    @contextmanager
    def noticing_lost(self, lease_ids: Iterable[int]) -> Iterator[None]:
        """Take etcd's refusal of a write in the body as the loss of these leases, which the next renewal would show seconds later."""
        try:
            yield
        except StoreRefused as error:
            if error.status == _NO_LEASE:
                for lease_id in {*lease_ids} & self._leases.keys():
                    self._lose(lease_id, "etcd does not have it")
            raise

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._leases.clear()

    async def _run(self) -> None:
        while True:
            try:
                await self._keep_alive()
            except (StoreError, TimeoutError) as error:
                logger.debug("lease stream broken: %s", error)
            except Exception:
                # Without the keeper this pod would lose its place in the mesh.
                logger.exception("unexpected error of the lease stream")
            self._drop_expired()
            await asyncio.sleep(RECONNECT_PAUSE_S)

    async def _keep_alive(self) -> None:
        """Renew all leases on one stream until it breaks."""
        stream = await self._connection.stream(KEEP_ALIVE)
        try:
            while True:
                self._wake.clear()
                await self._round(stream)
                # asyncio.wait_for may swallow a cancellation before Python 3.12.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._interval_s()):
                        await self._wake.wait()
        finally:
            stream.cancel()

    async def _round(self, stream: Stream[pb.LeaseKeepAliveResponse]) -> None:
        """Renew every lease once. etcd answers each request in order."""
        loop = asyncio.get_running_loop()
        sent_at_s = loop.time()
        asked = list(self._leases)
        try:
            await self._renew(stream, asked, sent_at_s)
        except TimeoutError:
            self._connection.abandon(stream)
            raise

    async def _renew(self, stream: Stream[pb.LeaseKeepAliveResponse], asked: list[int], sent_at_s: float) -> None:
        async with asyncio.timeout(self._interval_s()):
            for lease_id in asked:
                await self._connection.write(stream, pb.LeaseKeepAliveRequest(ID=lease_id))
            for _ in asked:
                answer = await self._connection.read(stream)
                state = self._leases.get(answer.ID)
                if state is None:
                    continue
                if answer.TTL > 0:
                    state.expires_at_s = sent_at_s + answer.TTL
                else:
                    self._lose(answer.ID, "etcd no longer has it")

    def _interval_s(self) -> float:
        return min((state.lease.ttl_s for state in self._leases.values()), default=60.0) / RENEWALS_PER_TTL

    def _drop_expired(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for lease_id, state in list(self._leases.items()):
            if state.expires_at_s <= now_s:
                self._lose(lease_id, f"not renewed for {state.lease.ttl_s:.0f} s")

    def _lose(self, lease_id: int, why: str) -> None:
        state = self._leases.pop(lease_id)
        logger.warning("lease %x lost: %s", lease_id, why)
        state.lease.lost.set()
