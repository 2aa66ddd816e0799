"""Changes of a pod's record: added to the record that they follow, they make the record that was meant."""

import itertools

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.model_state import CopyState, ModelState, Tier
from mesh.registry.pod_changes import PodChange, change_between, with_changes
from mesh.registry.records import InstanceRecord, decode_record, encode_record

states = st.builds(ModelState, state=st.sampled_from(CopyState), tier=st.sampled_from(Tier), running=st.integers(0, 9))
records = st.builds(
    InstanceRecord,
    start_time_ms=st.just(7),
    used_units=st.integers(0, 3),
    loads_in_progress=st.integers(0, 3),
    victim_use=st.sampled_from([0.0, 0.25]),
    copies=st.dictionaries(st.sampled_from("mno"), states, max_size=3),
)


def numbered(found: list[InstanceRecord]) -> list[InstanceRecord]:
    return [
        replace(record, change_number=number, count=len(record.copies)) for number, record in enumerate(found, start=1)
    ]


def changes_of(found: list[InstanceRecord]) -> list[PodChange]:
    """Return the changes between the records as readers decode them."""
    changes = []
    for old, new in itertools.pairwise(found):
        change = change_between(old, new, new.change_number)
        assert change is not None
        changes.append(decode_record(PodChange, encode_record(change)))
    return changes


@given(st.lists(records, min_size=2, max_size=5))
def test_changes_lead_from_each_record_to_the_last_one(found: list[InstanceRecord]) -> None:
    found = numbered(found)
    changes = changes_of(found)
    for record in found:
        # Those that the record holds already change nothing.
        assert with_changes(record, changes) == found[-1]


@given(st.lists(records, min_size=3, max_size=5))
def test_changes_that_were_missed_spoil_only_what_they_were_about(found: list[InstanceRecord]) -> None:
    found = numbered(found)
    changes = changes_of(found)
    seen = with_changes(found[0], changes[-1:])
    for model_id, copy in changes[-1].copies.items():
        assert seen.copies.get(model_id) == copy


def test_changes_of_another_process_are_ignored() -> None:
    record = InstanceRecord(start_time_ms=7, change_number=3)
    assert with_changes(record, [PodChange(start_time_ms=6, number=9, used_units=5)]) is record


def test_figures_that_can_wait_need_no_record() -> None:
    record = InstanceRecord(start_time_ms=7, copies={"m": ModelState()})
    busy = replace(record, running=3, requests_per_min=60, used_ms={"m": 5}, loads_in_progress=1)
    assert change_between(record, busy, 1) == PodChange(start_time_ms=7, number=1, loads_in_progress=1)


def test_a_change_of_who_the_pod_is_needs_the_whole_record() -> None:
    record = InstanceRecord(start_time_ms=7, grpc_address="a:1", capacity_units=5)
    for other in (
        replace(record, shutting_down=True),
        replace(record, cannot_serve=True),
        replace(record, capacity_units=6),
        replace(record, labels=("gpu",)),
    ):
        assert change_between(record, other, 1) is None


def test_a_load_writes_a_fraction_of_the_record() -> None:
    loaded = ModelState(weight_bytes=8 << 30, quantization="nf4", dtype="bfloat16", architecture="LlamaForCausalLM")
    copies = {f"org/model-{number}__0123456789": loaded for number in range(20)}
    record = InstanceRecord(start_time_ms=1 << 40, count=20, used_units=20 << 20, copies=copies)
    loading = ModelState(state=CopyState.LOADING, tier=Tier.UNKNOWN)
    begun = {model_id: copies[model_id] for model_id in list(copies)[1:]} | {"org/new__0123456789": loading}
    change = change_between(record, replace(record, copies=begun, loads_in_progress=1), 1)
    assert change is not None
    assert len(encode_record(change)) < len(encode_record(record)) / 10
