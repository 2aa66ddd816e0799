"""The pure plans of vmodels: whatever is set, finished, parked and deleted, references are what they say and nothing in use is deleted."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import MeshError
from mesh.registry.records import ModelRecord, VModelRecord
from mesh.registry.vmodel_plan import (
    VModelPlan,
    VModelRequest,
    VModelView,
    plan_delete,
    plan_finish,
    plan_park,
    plan_set,
)
from mesh.types import ModelInfo

MODELS = ("m0", "m1", "m2")
VMODELS = ("v0", "v1")

wishes = st.builds(
    VModelRequest,
    vmodel_id=st.sampled_from(VMODELS),
    target_id=st.sampled_from(MODELS),
    info=st.one_of(st.none(), st.sampled_from([ModelInfo("llm", "a"), ModelInfo("llm", "b")])),
    auto_delete=st.booleans(),
    update_only=st.booleans(),
    force=st.booleans(),
    expected_target_id=st.sampled_from(("", *MODELS)),
    owner=st.sampled_from(("", "x", "y")),
)
actions = st.one_of(
    st.tuples(st.just("set"), wishes, st.booleans()),
    st.tuples(st.sampled_from(["finish", "park", "delete"]), st.sampled_from(VMODELS), st.sampled_from(MODELS)),
    st.tuples(st.just("copies"), st.sampled_from(MODELS), st.integers(0, 2)),
)


T = TypeVar("T")


def _write(table: dict[str, T], changes: Mapping[str, T | None]) -> None:
    """Apply changes to a table; None deletes the record."""
    for record_id, record in changes.items():
        if record is None:
            table.pop(record_id, None)
        else:
            table[record_id] = record


class World:
    """All records, changed by plans alone (and by placement, which changes copies)."""

    def __init__(self) -> None:
        self.vmodels: dict[str, VModelRecord] = {}
        self.models: dict[str, ModelRecord] = {}

    def view(self, vmodel_id: str, *more: str) -> VModelView:
        vmodel = self.vmodels.get(vmodel_id)
        ids = {*more, *((vmodel.active_id, vmodel.target_id) if vmodel else ())}
        return VModelView(vmodel, {model_id: self.models.get(model_id) for model_id in ids})

    def apply(self, vmodel_id: str, plan: VModelPlan) -> None:
        _write(self.vmodels, {vmodel_id: plan.vmodel})
        _write(self.models, plan.models)

    def step(self, action: tuple[object, ...]) -> None:
        match action:
            case ("set", VModelRequest() as request, bool() as loaded):
                view = self.view(request.vmodel_id, request.target_id)
                try:
                    plan = plan_set(request, view, target_is_loaded=loaded, now_ms=5, default_owner="x")
                except MeshError:
                    return
                again = plan_set(
                    request, self.after(view, plan, request), target_is_loaded=loaded, now_ms=5, default_owner="x"
                )
                assert again == VModelPlan(plan.vmodel), "asking twice changes nothing the second time"
                assert plan.vmodel is not None
                assert plan.vmodel.target_id == request.target_id
                assert not plan.vmodel.failed
                self.apply(request.vmodel_id, plan)
            case ("finish", str() as vmodel_id, str() as target_id):
                self.apply(vmodel_id, plan_finish(self.view(vmodel_id), target_id=target_id))
            case ("park", str() as vmodel_id, str() as target_id):
                self.apply(vmodel_id, plan_park(self.view(vmodel_id), target_id=target_id))
            case ("delete", str() as vmodel_id, str()):
                self.apply(vmodel_id, plan_delete(self.view(vmodel_id), owner=""))
            case ("copies", str() as model_id, int() as copies) if model_id in self.models:
                placed = {f"pod-{number}": 1 for number in range(copies)}
                self.models[model_id] = msgspec.structs.replace(self.models[model_id], instance_ids=placed)

    def after(self, view: VModelView, plan: VModelPlan, request: VModelRequest) -> VModelView:
        return VModelView(plan.vmodel, {**view.models, **plan.models})

    def check(self) -> None:
        for model_id, model in self.models.items():
            assert model.refs == sum(
                model_id in (vmodel.active_id, vmodel.target_id) for vmodel in self.vmodels.values()
            )
            assert model.refs > 0 or not model.auto_delete
        for vmodel in self.vmodels.values():
            assert {vmodel.active_id, vmodel.target_id} <= self.models.keys(), "what a vmodel points at exists"
            assert vmodel.is_moving or not vmodel.failed


@settings(max_examples=200, deadline=None)
@given(st.lists(actions, max_size=25))
def test_plans_keep_reference_counts(steps: list[tuple[object, ...]]) -> None:
    world = World()
    for action in steps:
        world.step(action)
        world.check()


@given(wishes, st.booleans())
def test_plan_keeps_the_active_model_until_the_target_is_loaded(request: VModelRequest, auto: bool) -> None:
    """No gap: unless forced, a name with a loaded active model never points at one that is not."""
    active = ModelRecord(type="llm", path="active", refs=1, auto_delete=auto, instance_ids={"pod": 1})
    view = VModelView(
        VModelRecord(owner="x", active_id="active", target_id="active"), {"active": active, request.target_id: None}
    )
    try:
        plan = plan_set(request, view, target_is_loaded=False, now_ms=5, default_owner="x")
    except MeshError:
        return
    assert plan.vmodel is not None
    assert plan.vmodel.active_id == (request.target_id if request.force else "active")
    if not request.force:
        assert "active" not in plan.models, "the active model is not touched"


@given(st.sampled_from(MODELS))
def test_finish_of_a_move_that_was_replaced_changes_nothing(target_id: str) -> None:
    vmodel = VModelRecord(active_id="a", target_id="b")
    view = VModelView(vmodel, {"a": ModelRecord(refs=1), "b": ModelRecord(refs=1)})
    assert plan_finish(view, target_id=target_id) == VModelPlan(vmodel)
    assert plan_park(view, target_id=target_id) == VModelPlan(vmodel)
