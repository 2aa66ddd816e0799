"""Provides the pods of the mesh: ModelMesh's `instances` table, in which each record is under its own pod's lease."""

from mesh.registry.leader_latch import LeaderLatch
from mesh.registry.records import InstanceRecord, encode_record
from mesh.registry.table import Table
from mesh.store.leased_key import LeasedKey
from mesh.store.protocol import Store


class Instances:
    def __init__(self, store: Store, prefix: str, *, own_id: str, ttl_s: float, latch_prefix: str) -> None:
        """`latch_prefix`: the prefix of ModelMesh's leader election, in which Java pods take part, too."""
        # After a loss, each pod publishes its record again within its lease's time to live.
        self.table = Table(store, prefix, InstanceRecord, keep_lost_s=ttl_s)
        self.own_id = own_id
        self._own = LeasedKey(store, prefix + own_id, ttl_s=ttl_s)
        self._latch = LeaderLatch(store, latch_prefix, own_id, ttl_s=ttl_s)

    async def start(self, timeout_s: float) -> None:
        """Fill the table and watch the election. Raises StoreError."""
        await self.table.start(timeout_s)
        await self._latch.start(timeout_s)

    async def publish(self, record: InstanceRecord) -> None:
        """Write this pod's record. Raises StoreError; the record is then written when the store is back. It is written again after a lost lease."""
        await self._own.set(encode_record(record))
        await self._latch.join()

    async def close(self) -> None:
        """Withdraw this pod's record and its candidacy, and stop watching."""
        await self._own.remove()
        await self._latch.close()
        await self.table.close()

    @property
    def is_leased(self) -> bool:
        """Whether this pod's record exists under a lease that has not ended."""
        return self._own.is_held

    def get(self, instance_id: str) -> InstanceRecord | None:
        return self.table.get(instance_id)

    def live(self) -> list[tuple[str, InstanceRecord]]:
        """Return the pods that accept work, with their ids: not those that are shutting down or whose runtime does not answer."""
        return [
            (instance_id, record)
            for instance_id, record in self.table.items()
            if not (record.shutting_down or record.cannot_serve)
        ]

    def secure_address(self, address: str) -> str:
        """Return the address of a pod's listener for peers, by its address for callers; empty if the pod has none."""
        for _, pod in self.table.items():  # noqa: PERF102 - a table is not a dict
            if address == pod.grpc_address:
                return pod.peer_grpc_address
            if address == pod.http_address:
                return pod.peer_http_address
        return ""

    def is_leader(self) -> bool:
        """Return whether this pod does the housekeeping, which is the task of one pod for all."""
        return self._latch.is_leader()
