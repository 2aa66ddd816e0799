"""The names that Envoy may carry, kept up to date with each change, beside a list that is made from nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.changes import Changes
from common.model_key import CopySettings
from common.model_state import CopyState, ModelState
from mesh.envoy.plan import CarriedName, Carrier
from mesh.envoy.view import CarriedNames
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.model_states import ModelStates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import InstanceRecord, ModelRecord, R, VModelRecord
from mesh.registry.registry import Registry
from mesh.registry.table import Table, Versioned
from mesh.store.embedded import EmbeddedStore
from mesh.types import ModelInfo, RuntimeLimits, RuntimeSnapshot

OWN, PEERS = "pod-a", ("pod-b", "pod-c")
MODELS = st.sampled_from(["m", "n", "o"])
STATES = st.builds(
    ModelState,
    state=st.sampled_from([CopyState.LOADED, CopyState.LOADING, CopyState.FAILED]),
    waiting=st.sampled_from([0, 5]),
)
RECORDS = st.builds(
    ModelRecord,
    type=st.just("llm"),
    key=st.sampled_from(["", '{"adapter_of":"m"}', '{"adapter_of":"alias"}']),
    path=st.sampled_from(["/1", "/2"]),
    instance_ids=st.dictionaries(st.sampled_from((OWN, *PEERS)), st.just(1)),
)
PODS = st.builds(
    InstanceRecord,
    grpc_address=st.sampled_from(["10.0.0.2:1", "10.0.0.3:1", ""]),
    http_address=st.just("10.0.0.2:2"),
    peer_grpc_address=st.sampled_from(["", "10.0.0.2:3"]),
    shutting_down=st.booleans(),
    kv_usage=st.sampled_from([0.0, 0.9]),
    copies=st.dictionaries(MODELS, STATES),
)
STEPS = st.one_of(
    st.tuples(st.just("model"), MODELS, st.none() | RECORDS),
    st.tuples(
        st.just("vmodel"),
        st.sampled_from(["alias", "m"]),
        st.none() | st.builds(VModelRecord, active_id=MODELS, target_id=MODELS),
    ),
    st.tuples(st.just("pod"), st.sampled_from((OWN, *PEERS)), st.none() | PODS),
    st.tuples(st.just("copy"), MODELS, st.none() | st.tuples(st.sampled_from(CopyState), st.sampled_from([0, 2]))),
    st.tuples(st.just("snapshot"), st.dictionaries(MODELS, STATES), st.none()),
    st.tuples(st.just("serving"), st.booleans(), st.none()),
    st.tuples(st.just("usable"), st.sets(st.sampled_from(PEERS)), st.none()),
    st.tuples(st.just("cut off"), st.booleans(), st.none()),
    st.tuples(st.just("doubted"), st.booleans(), st.none()),
)


@dataclass
class FakeMonitor:
    """Times are the numbers of the steps."""

    limits: RuntimeLimits | None = None
    snapshot: RuntimeSnapshot = field(default_factory=lambda: RuntimeSnapshot(0))
    snapshot_s: float = 0.0
    is_serving: bool = True

    def model(self, model_id: str) -> ModelState | None:
        return next((model for model in self.snapshot.models if model.model_id == model_id), None)

    def serves(self, copy: LocalCopy) -> bool:
        model = self.model(copy.model_id)
        return self.is_serving and (
            model is None or model.state is CopyState.LOADED or copy.loaded_s >= self.snapshot_s
        )


class World:
    def __init__(self) -> None:
        self.registry = Registry(
            EmbeddedStore(Path("never-opened")),
            root_prefix="",
            kv_prefix="mm",
            service_name="svc",
            instance_id=OWN,
            session_ttl_s=5.0,
            default_owner="",
        )
        self.copies = LocalCopies(Changes(), lambda _: CopySettings())
        self.monitor = FakeMonitor()
        self.usable = set(PEERS)
        self.is_cut_off = False
        self.is_doubted = False
        self.number = 0

    def names(self) -> CarriedNames:
        instances = self.registry.instances
        pods = SimpleNamespace(
            pods=lambda: {pod_id: pod for pod_id, pod in instances.live() if pod_id in {OWN, *self.usable}}
        )
        return CarriedNames(
            self.registry,
            cast("ModelStates", pods),
            cast("RuntimeMonitor", self.monitor),
            self.copies,
            secure_address=instances.secure_address,
            is_cut_off=lambda: self.is_cut_off,
            is_doubted=lambda: self.is_doubted,
            carriers=frozenset(Carrier),
        )

    def apply(self, kind: str, what: object, value: object) -> None:
        self.number += 1
        match kind, what, value:
            case "model", str(name), ModelRecord() | None as record:
                self._write(self.registry.models.table, name, record)
            case "vmodel", str(name), VModelRecord() | None as vmodel:
                self._write(self.registry.vmodels.table, name, vmodel)
            case "pod", str(name), InstanceRecord() | None as pod:
                self._write(self.registry.instances.table, name, pod)
            case "copy", str(name), None:
                if (copy := self.copies.get(name)) is not None:
                    self.copies.remove(copy)
            case "copy", str(name), (CopyState() as state, int(limit)):
                self._set_copy(name, state, limit)
            case "snapshot", dict(models), _:
                found = tuple(ModelState(model_id=each, state=s.state, waiting=s.waiting) for each, s in models.items())
                self.monitor.snapshot, self.monitor.snapshot_s = RuntimeSnapshot(0, models=found), self.number
            case "serving", bool(is_serving), _:
                self.monitor.is_serving = is_serving
            case "usable", set(pods), _:
                self.usable = pods
            case "cut off", bool(is_cut_off), _:
                self.is_cut_off = is_cut_off
            case "doubted", bool(is_doubted), _:
                self.is_doubted = is_doubted

    def _write(self, table: Table[R], name: str, record: R | None) -> None:
        table.absorb_write(name, Versioned(None), record, self.number)

    def _set_copy(self, name: str, state: CopyState, limit: int) -> None:
        copy = self.copies.get(name)
        if copy is None:
            copy = LocalCopy(name, ModelInfo("llm", "/1"), started_ms=self.number)
            self.copies.add(copy)
        copy.max_concurrency = limit
        if state is CopyState.LOADED and not copy.is_loaded:
            copy.loaded_s = self.number
        self.copies.set_state(copy, state)


@given(st.lists(st.lists(STEPS, min_size=1, max_size=4), max_size=20))
def test_changed_names_lead_to_the_list_made_from_nothing(turns: list[list[tuple[str, object, object]]]) -> None:
    world = World()
    names, known = world.names(), dict[str, tuple[CarriedName, ...]]()
    for model_id in ("m", "n"):
        world.apply("model", model_id, ModelRecord(type="llm", path="/1", instance_ids={OWN: 1, "pod-b": 1}))
        world.apply("copy", model_id, (CopyState.LOADED, 0))
    world.apply("pod", "pod-b", InstanceRecord(grpc_address="10.0.0.2:1", copies={"m": ModelState()}))
    for steps in turns:
        for step in steps:
            world.apply(*step)
        known |= names.changed()
        assert {model_id: each for model_id, each in known.items() if each} == world.names().changed()
        assert names.changed() == {}


def test_a_change_concerns_the_names_of_its_model_only() -> None:
    world = World()
    names, loaded = world.names(), (CopyState.LOADED, 0)
    for model_id in ("m", "n"):
        world.apply("model", model_id, ModelRecord(type="llm", path="/1"))
        world.apply("copy", model_id, loaded)
    assert names.changed().keys() == {"m", "n"}
    world.apply("copy", "m", None)
    assert names.changed() == {"m": ()}
    world.apply("vmodel", "alias", VModelRecord(active_id="n", target_id="n"))
    ((model_id, listed),) = names.changed().items()
    assert (model_id, {each.name for each in listed}) == ("n", {"alias"})


def test_a_copy_is_judged_by_the_first_snapshot_after_its_load() -> None:
    world = World()
    names, snapshot = world.names(), {"m": ModelState(state=CopyState.FAILED)}
    world.apply("model", "m", ModelRecord(type="llm", path="/1"))
    world.apply("snapshot", snapshot, None)
    world.apply("copy", "m", (CopyState.LOADED, 0))
    assert names.changed()["m"], "the snapshot was made before the load had ended"
    world.apply("snapshot", snapshot, None)
    assert names.changed() == {"m": ()}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"kv_usage": 0.99, "copies": {"m": ModelState(waiting=5)}}, id="load"),
        pytest.param({"grpc_address": "10.0.0.3:1"}, id="address"),
        pytest.param({"peer_grpc_address": "10.0.0.2:3"}, id="secure address"),
        pytest.param({"shutting_down": True}, id="shutdown"),
    ],
)
def test_a_peers_record_changes_the_names_of_its_copies(change: dict[str, Any]) -> None:
    world = World()
    names = world.names()
    world.apply("model", "m", ModelRecord(type="llm", path="/1", instance_ids={"pod-b": 1}))
    pod = InstanceRecord(grpc_address="10.0.0.2:1", http_address="10.0.0.2:2", copies={"m": ModelState()})
    world.apply("pod", "pod-b", pod)
    before = names.changed()["m"]
    world.apply("pod", "pod-b", msgspec.structs.replace(pod, **change))
    changed = names.changed()
    assert changed["m"] != before
    assert {model_id: each for model_id, each in changed.items() if each} == world.names().changed()


def test_a_moving_name_follows_the_end_of_its_active_model() -> None:
    world = World()
    names = world.names()
    for model_id in ("m", "n"):
        world.apply("model", model_id, ModelRecord(type="llm", path="/1"))
    world.apply("copy", "n", (CopyState.LOADED, 0))
    world.apply("vmodel", "alias", VModelRecord(active_id="m", target_id="n"))
    assert names.changed() == {}
    world.apply("model", "m", None)
    assert {each.name for each in names.changed()["n"]} == {"alias"}


def test_a_copy_of_a_doubted_runtime_takes_calls_through_the_mesh_only() -> None:
    world = World()
    names = world.names()
    world.apply("model", "m", ModelRecord(type="llm", path="/1", instance_ids={OWN: 1, "pod-b": 1}))
    world.apply("pod", "pod-b", InstanceRecord(grpc_address="10.0.0.2:1", copies={"m": ModelState()}))
    world.apply("copy", "m", (CopyState.LOADED, 0))
    waits = {each.local_wait_s for each in names.changed()["m"]}
    assert waits == {0.0}
    world.apply("doubted", True, None)
    assert {each.local_wait_s for each in names.changed()["m"]} == {None}
    world.apply("doubted", False, None)
    assert {each.local_wait_s for each in names.changed()["m"]} == waits
