"""Provides the pods of the mesh: ModelMesh's `instances` table, in which each record is under its own pod's lease."""

from collections.abc import Callable

import msgspec

from mesh.registry.leader_latch import LeaderLatch
from mesh.registry.pod_changes import PodChange, change_between, with_changes
from mesh.registry.records import InstanceRecord, encode_record
from mesh.registry.table import Listener, Table
from mesh.store.leased_key import LeasedKey
from mesh.store.protocol import Store


class Instances:
    """Reads combine each pod's record with the changes that the pod has written after it."""

    def __init__(
        self, store: Store, prefix: str, changes_prefix: str, *, own_id: str, ttl_s: float, latch_prefix: str
    ) -> None:
        """`latch_prefix`: the prefix of ModelMesh's leader election, in which Java pods take part, too."""
        # After a loss, each pod publishes its record again within its lease's time to live.
        self.table = Table(store, prefix, InstanceRecord, keep_lost_s=ttl_s)
        self.own_id = own_id
        self._store = store
        self._own = LeasedKey(store, prefix + own_id, ttl_s=ttl_s)
        self._own_changes_key = changes_prefix + own_id
        self._published: InstanceRecord | None = None  # with the changes; None if it is not known what readers have
        self._number = 0  # of the last write
        self._latch = LeaderLatch(store, latch_prefix, own_id, ttl_s=ttl_s)
        self._change_table = Table(store, changes_prefix, PodChange)
        self._changes: dict[str, list[PodChange]] = {}  # those after each pod's record
        self._records: dict[str, InstanceRecord] = {}  # with the changes
        self._sorted: list[tuple[str, InstanceRecord]] | None = None
        self._live: list[tuple[str, InstanceRecord]] | None = None
        self._listeners: list[Listener[InstanceRecord]] = []
        self.table.listen(self._record_changed)
        self._change_table.listen(self._change_seen)

    async def start(self, timeout_s: float) -> None:
        """Fill the tables and watch the election. Raises StoreError."""
        await self.table.start(timeout_s)
        await self._change_table.start(timeout_s)
        await self._latch.start(timeout_s)

    async def publish(self, record: InstanceRecord, *, whole: bool = True) -> bool:
        """Write this pod's record. Raises StoreError; the record is then written when the store is back. It is written again after a lost lease.

        Unless `whole`, only what changed is written if that suffices and all pods can read it. Return whether the whole record was written.
        """
        self._number += 1
        record = msgspec.structs.replace(record, change_number=self._number, reads_changes=True)
        published, self._published = self._published, None
        change = None
        if not whole and published is not None and self._own.is_held and self._can_all_read_changes():
            change = change_between(published, record, self._number)
        is_whole = change is None or not await self._write_change(change, record)
        if is_whole:
            await self._own.set(encode_record(record))
        self._published = record
        await self._latch.join()
        return is_whole

    async def close(self) -> None:
        """Withdraw this pod's record and its candidacy, and stop watching."""
        await self._own.remove()
        await self._latch.close()
        await self._change_table.close()
        await self.table.close()

    @property
    def is_leased(self) -> bool:
        """Whether this pod's record exists under a lease that has not ended."""
        return self._own.is_held

    def get(self, instance_id: str) -> InstanceRecord | None:
        return self._records.get(instance_id)

    def items(self) -> list[tuple[str, InstanceRecord]]:
        """Return all pods with their ids, sorted by id."""
        if self._sorted is None:
            self._sorted = sorted(self._records.items())
        return list(self._sorted)

    def listen(self, listener: Listener[InstanceRecord]) -> Callable[[], None]:
        """Add a listener of the pods' records, and return the function that removes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def gone_addresses(self, old: InstanceRecord | None, new: InstanceRecord | None) -> set[str]:
        """Return the addresses of the old record that no pod has any more, after the new one has replaced it."""
        gone = _addresses(old) - _addresses(new)
        return gone.difference(*map(_addresses, self._records.values())) if gone else gone

    async def refresh(self, instance_id: str) -> None:
        """Read a pod's record from the store, if it answers."""
        await self.table.refresh(instance_id)
        await self._change_table.refresh(instance_id)

    def live(self) -> list[tuple[str, InstanceRecord]]:
        """Return the pods that accept work, with their ids: not those that are shutting down or whose runtime does not answer."""
        if self._live is None:
            self._live = [
                (instance_id, record)
                for instance_id, record in self.items()
                if not (record.shutting_down or record.cannot_serve)
            ]
        return list(self._live)

    def secure_address(self, address: str) -> str:
        """Return the address of a pod's listener for peers, by its address for callers; empty if the pod has none."""
        for pod in self._records.values():
            if address == pod.grpc_address:
                return pod.peer_grpc_address
            if address == pod.http_address:
                return pod.peer_http_address
        return ""

    def is_leader(self) -> bool:
        """Return whether this pod does the housekeeping, which is the task of one pod for all."""
        return self._latch.is_leader()

    def _can_all_read_changes(self) -> bool:
        """Return whether every pod of the mesh but Java pods, which read no states of copies, knows of changes."""
        return all(pod.reads_changes for pod in self._records.values() if pod.grpc_address)

    async def _write_change(self, change: PodChange, record: InstanceRecord) -> bool:
        """Write a change under the record's lease, and return whether it is smaller than the record. Raises StoreError."""
        whole, part = encode_record(record), encode_record(change)
        if len(part) >= len(whole):
            return False
        await self._store.put(self._own_changes_key, part, lease=self._own.lease)
        self._own.remember(whole)
        return True

    def _record_changed(self, instance_id: str, _: InstanceRecord | None, new: InstanceRecord | None) -> None:
        changes = self._changes.pop(instance_id, [])
        if new is not None:
            self._changes[instance_id] = [
                change
                for change in changes
                if change.start_time_ms == new.start_time_ms and change.number > new.change_number
            ]
        elif instance_id == self.own_id:
            self._own.put_again()
        self._combine(instance_id)

    def _change_seen(self, instance_id: str, _: PodChange | None, new: PodChange | None) -> None:
        if new is not None:
            # A process numbers its changes, so a lower number is the earlier change, or that of an earlier process.
            changes = [change for change in self._changes.get(instance_id, ()) if change.number < new.number]
            self._changes[instance_id] = [*changes, new]
            self._combine(instance_id)
        elif instance_id not in self.table:
            self._changes.pop(instance_id, None)

    def _combine(self, instance_id: str) -> None:
        old, written = self._records.get(instance_id), self.table.get(instance_id)
        new = None if written is None else with_changes(written, self._changes.get(instance_id, ()))
        if new == old:
            return
        self._sorted = self._live = None
        if new is None:
            del self._records[instance_id]
        else:
            self._records[instance_id] = new
        for listener in tuple(self._listeners):
            listener(instance_id, old, new)


def _addresses(record: InstanceRecord | None) -> set[str]:
    if record is None:
        return set()
    found = {record.grpc_address, record.http_address, record.peer_grpc_address, record.peer_http_address}
    return found - {""}
