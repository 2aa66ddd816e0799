"""Which addresses no pod has any more once a pod's record has changed or gone."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mesh.registry.instances import Instances
from mesh.registry.records import InstanceRecord
from mesh.registry.table import Versioned
from mesh.store.embedded import EmbeddedStore

addresses = st.sampled_from(["", "a:1", "a:2", "b:1"])
records = st.none() | st.builds(
    InstanceRecord, grpc_address=addresses, http_address=addresses, peer_grpc_address=addresses
)


def addresses_of(record: InstanceRecord | None) -> set[str]:
    if record is None:
        return set()
    return {record.grpc_address, record.http_address, record.peer_grpc_address} - {""}


@given(st.lists(st.tuples(st.sampled_from("xy"), records), max_size=8))
def test_gone_addresses_are_those_of_no_record_that_is_left(steps: list[tuple[str, InstanceRecord | None]]) -> None:
    pods = Instances(EmbeddedStore(Path("never-opened")), "i/", "c/", own_id="x", ttl_s=5.0, latch_prefix="l/")
    known: dict[str, InstanceRecord | None] = {}
    gone: list[set[str]] = []
    pods.listen(lambda _, old, new: gone.append(pods.gone_addresses(old, new)))
    for revision, (pod_id, record) in enumerate(steps, start=1):
        gone.clear()
        before = known.get(pod_id)
        pods.table.absorb_write(pod_id, Versioned(None), record, revision)
        known[pod_id] = record
        left = set[str]().union(*map(addresses_of, known.values()))
        assert gone == ([addresses_of(before) - left] if before != record else [])
