"""Records: ModelMesh's JSON as it is, and nothing lost on a rewrite."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model_state import CopyState, ModelState, Tier
from mesh.registry.records import (
    Failure,
    InstanceRecord,
    ModelRecord,
    Record,
    VModelRecord,
    decode_record,
    encode_record,
)
from mesh.types import ModelInfo

text = st.text(max_size=12)
epoch_ms = st.integers(0, 2**63 - 1)
placement = st.dictionaries(text, epoch_ms, max_size=3)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)

model_records = st.builds(
    ModelRecord,
    type=text,
    key=text,
    path=text,
    instance_ids=placement,
    failed_in=placement,
    failures=st.dictionaries(text, st.builds(Failure, message=text), max_size=2),
    refs=st.integers(0, 9),
    auto_delete=st.booleans(),
    last_used_ms=epoch_ms,
    entered_ms=epoch_ms,
    last_unload_ms=epoch_ms,
    actionable=st.booleans(),
)
vmodel_records = st.builds(VModelRecord, owner=text, active_id=text, target_id=text, failed=st.booleans())
copies = st.builds(ModelState, state=st.sampled_from(CopyState), tier=st.sampled_from(Tier), running=st.integers(0, 99))
instance_records = st.builds(
    InstanceRecord,
    start_time_ms=epoch_ms,
    version=epoch_ms,
    location=text,
    zone=text,
    labels=st.lists(text, max_size=3).map(tuple),
    lru_time_ms=epoch_ms,
    count=st.integers(0, 99),
    shutting_down=st.booleans(),
    grpc_address=text,
    kv_usage=st.floats(0, 1),
    copies=st.dictionaries(text, copies, max_size=2),
)
records = st.one_of(model_records, vmodel_records, instance_records)


@given(records)
def test_records_round_trip(record: Record) -> None:
    assert decode_record(type(record), encode_record(record)) == record


@given(records, st.dictionaries(text.filter(bool), json_value, max_size=4))
def test_records_keep_unknown_properties(record: Record, others: dict[str, object]) -> None:
    names = {field.encode_name for field in msgspec.structs.fields(type(record))} - {"unknown"}
    others = {name: value for name, value in others.items() if name not in names}
    written = {
        **msgspec.json.decode(encode_record(record)),
        **{name: msgspec.Raw(_plain_json(value)) for name, value in others.items()},
    }
    read = decode_record(type(record), msgspec.json.encode(written))
    assert msgspec.structs.replace(read, unknown=()) == record
    rewritten = msgspec.json.decode(encode_record(read), type=dict[str, msgspec.Raw])
    for name, value in others.items():
        assert bytes(rewritten[name]) == _plain_json(value)
    assert decode_record(type(record), encode_record(read)) == read


def _plain_json(value: object) -> bytes:
    import json

    return json.dumps(value).encode()


def test_records_keep_an_unknown_property_named_like_a_field() -> None:
    record = decode_record(ModelRecord, b'{"type":"llm","unknown":[1,2]}')
    assert msgspec.json.decode(encode_record(record)) == {"type": "llm", "unknown": [1, 2]}


def test_records_use_modelmesh_property_names() -> None:
    record = ModelRecord(
        type="llm",
        key='{"storage_key":"s3"}',
        path="m",
        instance_ids={"abc-1": 5},
        failed_in={"abc-2": 6},
        failures={"abc-2": Failure(message="no memory")},
        refs=1,
        auto_delete=True,
        last_used_ms=7,
        last_unload_ms=8,
    )
    assert msgspec.json.decode(encode_record(record)) == {
        "type": "llm",
        "encKey": '{"storage_key":"s3"}',
        "mPath": "m",
        "instanceIds": {"abc-1": 5},
        "failedIn": {"abc-2": 6},
        "fails": {"abc-2": {"msg": "no memory"}},
        "refs": 1,
        "autoDel": True,
        "lu": 7,
        "lul": 8,
    }
    assert record.info == ModelInfo("llm", "m", '{"storage_key":"s3"}')
    assert msgspec.json.decode(encode_record(VModelRecord(owner="o", active_id="a", target_id="b", failed=True))) == {
        "o": "o",
        "amid": "a",
        "tmid": "b",
        "failed": True,
    }
    instance = InstanceRecord(
        start_time_ms=1,
        version=2,
        location="l",
        zone="z",
        labels=("x",),
        lru_time_ms=3,
        count=4,
        capacity_units=5,
        used_units=6,
        loading_threads=7,
        loads_in_progress=8,
        requests_per_min=9,
        shutting_down=True,
    )
    assert msgspec.json.decode(encode_record(instance)) == {
        "startTime": 1,
        "vers": 2,
        "loc": "l",
        "zone": "z",
        "labels": ["x"],
        "lruTime": 3,
        "count": 4,
        "cap": 5,
        "used": 6,
        "lThreads": 7,
        "lInProg": 8,
        "actionable": False,
        "rpm": 9,
        "shutdown": True,
    }


@pytest.mark.parametrize("kind", [ModelRecord, VModelRecord, InstanceRecord])
def test_records_omit_defaults_and_read_null_as_absent(kind: type[Record]) -> None:
    written = msgspec.json.decode(encode_record(kind()))
    assert all(value in (0, False) for value in written.values())
    assert bool(written) is (kind is InstanceRecord)  # Java writes an instance's numbers and flags always
    nulls = msgspec.json.encode(
        {field.encode_name: None for field in msgspec.structs.fields(kind) if field.name != "unknown"}
    )
    assert decode_record(kind, nulls) == kind()


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"refs":"three"}', b"{"])
def test_decode_record_refuses_other_json(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_record(ModelRecord, data)


def test_decode_record_reads_the_type_that_modelmesh_omits() -> None:
    assert decode_record(ModelRecord, b'{"mPath":"m"}').type == "NLCLASSIFIER"
