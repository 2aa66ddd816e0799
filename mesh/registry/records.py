"""Defines the registry's records: ModelMesh's JSON, property for property, readable by its controller and with etcdctl.

Defaults are omitted. Unknown properties are kept unchanged, so that the fields of newer pods and of other
implementations survive a rewrite. Times are epoch milliseconds. Properties that ModelMesh does not have are marked
below.
"""

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import field

from common.model_key import CopySettings
from common.model_state import DeviceFigures, ModelState
from mesh.registry.copy_settings import DEFAULT, copy_settings_of, identity_of, mentions_copies
from mesh.types import ModelInfo

LRU_EMPTY_MS = 2**63 - 1
CAPACITY_UNIT_BYTES = 8192


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """`unknown`: the properties of the JSON object that have no field here, each with its JSON text."""

    unknown: tuple[tuple[str, bytes], ...] = ()


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a pod failed to load a model. `lasting`: time alone does not help. `unknown`: as in Record."""

    message: str = field(default="", name="msg")
    lasting: bool = False
    unknown: tuple[tuple[str, bytes], ...] = ()


class ModelRecord(Record, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A registered model. Attributes are immutable; placement, references and last use change.

    A pod is in at most one of `instance_ids` (loading or loaded, with the time at which the load began) and `failed_in`.
    """

    type: str = "NLCLASSIFIER"  # ModelMesh's default, which it does not write
    key: str = field(default="", name="encKey")
    path: str = field(default="", name="mPath")
    instance_ids: Mapping[str, int] = field(default_factory=dict, name="instanceIds")
    failed_in: Mapping[str, int] = field(default_factory=dict, name="failedIn")
    failures: Mapping[str, Failure] = field(default_factory=dict, name="fails")
    refs: int = 0  # number of vmodels whose active or target model this is
    auto_delete: bool = field(default=False, name="autoDel")
    last_used_ms: int = field(default=0, name="lu")
    entered_ms: int = field(
        default=0, name="enteredMs"
    )  # not in ModelMesh: `lu` at registration, which it equals until the first use
    weight_bytes: int = field(
        default=0, name="weightBytes"
    )  # not in ModelMesh: measured by the last load; 0 = never loaded
    num_failures: int = field(default=0, name="numFailures")  # not in ModelMesh: failed loads in a row, on any pods
    files_in: tuple[str, ...] = field(default=(), name="filesIn")  # not in ModelMesh: the last pods that loaded it
    use: float = 0.0  # not in ModelMesh: decayed uses when a copy was last unloaded
    changeable: CopySettings | None = field(
        default=None, name="copySettings"
    )  # not in ModelMesh: settings that are not part of the model's identity
    last_unload_ms: int = field(default=0, name="lul")
    actionable: bool = False

    @property
    def is_used(self) -> bool:
        """Return whether the model was used since its registration."""
        return self.last_used_ms > self.entered_ms

    @property
    def info(self) -> ModelInfo:
        """Return what identifies the model."""
        return identity_of(ModelInfo(self.type, self.path, self.key))

    @property
    def copy_settings(self) -> CopySettings:
        """Return the copy settings. Earlier releases and Java pods leave them in the key."""
        if self.changeable is None and not mentions_copies(self.key):
            return DEFAULT  # the common case, asked for each copy of a pod
        return self.changeable or copy_settings_of(ModelInfo(self.type, self.path, self.key))


class VModelRecord(Record, frozen=True, omit_defaults=True, kw_only=True, gc=False):
    """A stable name. It is moving while active and target differ. `failed`: the target could not be loaded, so the move is parked."""

    owner: str = field(default="", name="o")
    active_id: str = field(default="", name="amid")
    target_id: str = field(default="", name="tmid")
    failed: bool = False
    actionable: bool = False

    @property
    def is_moving(self) -> bool:
        return self.active_id != self.target_id


class InstanceRecord(Record, frozen=True, omit_defaults=True, kw_only=True):
    """A pod. Its key is leased, so the record disappears with the pod."""

    start_time_ms: int = field(default=0, name="startTime")
    version: int = field(default=0, name="vers")
    location: str = field(default="", name="loc")
    zone: str = ""
    labels: tuple[str, ...] = ()
    lru_time_ms: int = field(default=0, name="lruTime")  # LRU_EMPTY_MS while the pod holds no model
    count: int = 0  # models
    capacity_units: int = field(default=0, name="cap")  # of CAPACITY_UNIT_BYTES
    used_units: int = field(default=0, name="used")
    loading_threads: int = field(default=0, name="lThreads")
    loads_in_progress: int = field(default=0, name="lInProg")  # running and queued
    requests_per_min: int = field(default=0, name="rpm")
    shutting_down: bool = field(default=False, name="shutdown")
    actionable: bool = False
    # ModelMesh does not have the fields from here on.
    grpc_address: str = field(default="", name="grpcAddress")
    http_address: str = field(default="", name="httpAddress")
    load_failures: int = field(default=0, name="loadFailures")  # failed loads in a row, of any models
    victim_use: float = field(default=0.0, name="victimUse")  # decayed uses of the least used model
    peer_grpc_address: str = field(default="", name="peerGrpcAddress")  # over mutual TLS
    peer_http_address: str = field(default="", name="peerHttpAddress")
    cannot_serve: bool = field(default=False, name="cannotServe")  # the runtime does not answer, or its engine restarts
    device_budget_bytes: int = field(default=0, name="deviceBudgetBytes")
    device_used_bytes: int = field(default=0, name="deviceUsedBytes")
    host_budget_bytes: int = field(default=0, name="hostBudgetBytes")
    host_used_bytes: int = field(default=0, name="hostUsedBytes")
    kv_usage: float = field(default=0.0, name="kvUsage")  # 0 … 1
    running: int = 0
    waiting: int = 0
    tokens_per_s: float = field(default=0.0, name="tokensPerS")
    copies: Mapping[str, ModelState] = field(default_factory=dict)  # by model id
    devices: tuple[DeviceFigures, ...] = ()
    used_ms: Mapping[str, int] = field(default_factory=dict, name="usedMs")  # last use of each copy, by model id
    change_number: int = field(default=0, name="changeNumber")  # up to which PodChange the record is complete
    reads_changes: bool = field(default=False, name="readsChanges")  # earlier releases do not read a PodChange


R = TypeVar("R", bound=Record)

OWN_FIELD = "unknown"
_OWN_PROPERTY = b'"unknown"'
_FAILURES = "fails"


# Numbers and flags that ModelMesh's Java objects always write. Its readers accept their absence.
_ALWAYS_WRITTEN: Mapping[type[Record], Mapping[str, bytes]] = {
    InstanceRecord: {
        **dict.fromkeys(("startTime", "vers", "lruTime", "count", "cap", "used", "lThreads", "lInProg", "rpm"), b"0"),
        "actionable": b"false",
    }
}


def encode_record(record: Record) -> bytes:
    always = _ALWAYS_WRITTEN.get(type(record), {})
    failures = record.failures if isinstance(record, ModelRecord) else {}
    has_extended_failures = any(failure.unknown for failure in failures.values())
    if not record.unknown and not always and not has_extended_failures:
        return msgspec.json.encode(record)
    properties = {name: msgspec.Raw(text) for name, text in always.items()}
    properties |= _properties(record)
    if has_extended_failures:
        texts = {pod: msgspec.Raw(msgspec.json.encode(_properties(failure))) for pod, failure in failures.items()}
        properties[_FAILURES] = msgspec.Raw(msgspec.json.encode(texts))
    return msgspec.json.encode(properties)


def _properties(value: Record | Failure) -> dict[str, msgspec.Raw]:
    """Return the JSON texts of the properties by name, those without a field here included."""
    known = msgspec.json.encode(msgspec.structs.replace(value, unknown=()))
    properties = msgspec.json.decode(known, type=dict[str, msgspec.Raw])
    return properties | {name: msgspec.Raw(text) for name, text in value.unknown}


def decode_record(kind: type[R], data: bytes) -> R:
    """Decode a record. A null property counts as absent. Raises msgspec.MsgspecError for other JSON than an object, or a property of another type."""
    record = _decode_plain(kind, data) or _decode_any(kind, data)
    if isinstance(record, ModelRecord):
        _share(record)
    if isinstance(record, VModelRecord) and not record.is_moving:
        msgspec.structs.force_setattr(record, "target_id", record.active_id)
    return record


def _decode_plain(kind: type[R], data: bytes) -> R | None:
    """Decode a record whose properties all have a field here, in a third of the time of others. None if it may have more."""
    if _OWN_PROPERTY in data:
        return None
    try:
        record = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        return None
    return None if isinstance(record, ModelRecord) and record.failures else record


def _decode_any(kind: type[R], data: bytes) -> R:
    properties = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    names = {*kind.__struct_encode_fields__} - {OWN_FIELD}
    known = {name: raw for name, raw in properties.items() if name in names and bytes(raw).strip() != b"null"}
    unknown = tuple((name, bytes(raw)) for name, raw in properties.items() if name not in names)
    record = msgspec.json.decode(msgspec.json.encode(known) if len(known) < len(properties) else data, type=kind)
    if isinstance(record, ModelRecord) and record.failures:
        record = msgspec.structs.replace(record, failures=_failures(known[_FAILURES]))
    return msgspec.structs.replace(record, unknown=unknown) if unknown else record


_NO_PODS: dict[str, Any] = {}  # never changed: a record's mappings are replaced as a whole


def _share(record: ModelRecord) -> None:
    """Have equal parts of the records share their objects, because a mesh has 100,000 models that are loaded nowhere."""
    for name in ("instance_ids", "failed_in", "failures"):
        if not getattr(record, name):
            msgspec.structs.force_setattr(record, name, _NO_PODS)
    msgspec.structs.force_setattr(record, "type", sys.intern(record.type))
    if record.entered_ms == record.last_used_ms:
        msgspec.structs.force_setattr(record, "entered_ms", record.last_used_ms)


def _failures(text: msgspec.Raw) -> dict[str, Failure]:
    """Decode the failures by pod with the properties that have no field here."""
    names = {*Failure.__struct_encode_fields__} - {OWN_FIELD}
    by_pod = msgspec.json.decode(text, type=dict[str, dict[str, msgspec.Raw]])
    return {
        pod: msgspec.structs.replace(
            msgspec.json.decode(
                msgspec.json.encode({name: properties[name] for name in names & properties.keys()}), type=Failure
            ),
            unknown=tuple((name, bytes(raw)) for name, raw in properties.items() if name not in names),
        )
        for pod, properties in by_pod.items()
    }
