"""Records as ModelMesh writes them, from its recording: read, rewritten, and shared with its pods."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.registry.records import InstanceRecord, ModelRecord, Record, VModelRecord, decode_record, encode_record
from mesh.store.embedded import EmbeddedStore
from tests.support.pods import running_pod
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as pb

RECORDED = Path(__file__).parents[1] / "modelmesh" / "recorded"
KINDS: dict[str, type[Record]] = {"registry": ModelRecord, "vmodels": VModelRecord}
# A Java pod's own record, with the properties that the recording shows.
JAVA_POD = {
    "startTime": 1764475637000,
    "vers": 1764374400001,
    "loc": "10.0.0.7",
    "labels": ["rt:repertory"],
    "actionable": False,
    "lruTime": 1764475700000,
    "count": 1,
    "cap": 7201,
    "used": 123,
    "lThreads": 4,
    "lInProg": 0,
    "rpm": 0,
}


def recorded_records() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record that a recording shows, under its table. Times were masked and are put back."""
    for file in sorted(RECORDED.glob("*.json")):
        for rows in json.loads(file.read_text()).values():
            for row in rows:
                step = row["step"].get("step", row["step"])
                table = step.get("key", "").partition("/")[0]
                if step.get("etcd") == "get" and table in KINDS:
                    yield from ((table, unmasked(answer)) for answer in row["answers"] if answer)


def unmasked(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"POD"}:
            return {f"pod{number}": unmasked(json.loads(text)) for number, text in enumerate(value["POD"])}
        return {name: unmasked(item) for name, item in value.items()}
    return 1764475637000 if value == "T" else value


RECORDS = list({json.dumps(item, sort_keys=True): item for item in recorded_records()}.values())


@pytest.mark.parametrize(("table", "record"), RECORDS)
def test_records_of_modelmesh_are_rewritten_alike(table: str, record: dict[str, Any]) -> None:
    decoded = decode_record(KINDS[table], json.dumps(record).encode())
    defaults = {"o": "", "autoDel": False, "failed": False, "refs": 0, "actionable": False}
    wanted = {name: value for name, value in record.items() if name not in defaults or value != defaults[name]}
    assert json.loads(encode_record(decoded)) == wanted


def test_records_unknown_properties_of_failures_survive() -> None:
    record = {
        "type": "llm",
        "failedIn": {"pod0": 1, "pod1": 2},
        "fails": {"pod0": {"msg": "broken", "cause": {"code": 3}}, "pod1": {"msg": "broken"}},
        "later": True,
    }
    decoded = decode_record(ModelRecord, json.dumps(record).encode())
    assert decoded.failures["pod0"].message == "broken"
    assert json.loads(encode_record(decoded)) == record


def test_records_the_recording_has_models_failures_and_vmodels() -> None:
    seen = {name for _, record in RECORDS for name in record}
    assert {"type", "mPath", "instanceIds", "failedIn", "fails", "lu", "amid", "tmid"} <= seen


def test_records_a_pods_record_is_rewritten_alike() -> None:
    decoded = decode_record(InstanceRecord, json.dumps(JAVA_POD).encode())
    assert json.loads(encode_record(decoded)) == JAVA_POD


async def test_records_a_model_of_a_java_pod_is_loaded(tmp_path: Path) -> None:
    """Its pods write no state of a copy. A call at our pod loads a copy of its own and keeps the other's entry."""
    store = EmbeddedStore(tmp_path / "registry")
    await store.open()
    model = {"type": "llm", "mPath": "/m", "instanceIds": {"java-1": 1764475637000}, "lu": 1764475637000, "later": [1]}
    await store.put("/mm/repertory/registry/m", json.dumps(model).encode())
    await store.put("/mm/repertory/instances/java-1", json.dumps(JAVA_POD).encode())
    await store.close()
    async with running_pod(tmp_path / "pod", store=f"embedded:{tmp_path}/registry") as pod:
        status = await pod.management.getModelStatus(pb.GetStatusRequest(modelId="m"))
        assert status.status == pb.ModelStatusInfo.LOADED
        assert [copy.location for copy in status.modelCopyInfos] == ["java-1"]
        assert (await pod.load("m")).status == pb.ModelStatusInfo.LOADED
        assert not pod.runtime.loaded, "the mesh has a copy"
        assert await pod.echo("m") == b"hi"
        assert list(pod.runtime.loaded) == ["m"]
        record = pod.pod.registry.models.get("m")
        assert record is not None
        assert set(record.instance_ids) == {"java-1", "pod"}
        assert json.loads(encode_record(record))["later"] == [1]


async def test_records_a_java_pod_reads_ours(tmp_path: Path) -> None:
    """The properties that a Java pod needs for its placement, with its types, and what a call adds to `rpm`."""
    async with running_pod(tmp_path / "pod", labels=("b", "a"), zone="z1", location="here") as pod:
        await pod.register("m")
        for _ in range(3):
            await pod.echo("m")

        def own() -> dict[str, Any]:
            record = pod.pod.registry.instances.get("pod")
            return json.loads(encode_record(record)) if record is not None else {}

        await until(lambda: own().get("count") == 1)
        found = own()
        assert {name: type(found[name]) for name in JAVA_POD} == {name: type(value) for name, value in JAVA_POD.items()}
        assert (found["loc"], found["zone"], found["labels"]) == ("here", "z1", ["a", "b"])
        assert found["cap"] > found["used"] > 0
        assert pod.pod.copies.requests_per_min() == 3
