"""The schema of a model's state: the same fields from the engine's figures through the wire and the registry to the HTTP API."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from common.model_key import ModelSettings
from common.model_state import CopyState, ModelFigures, ModelState, Tier
from mesh.client.admin import Copy
from mesh.client.runtime_state import SnapshotReader
from mesh.registry.records import InstanceRecord, decode_record, encode_record
from runtime.api.state import state_of, to_message
from runtime.models.model_state import ModelView, Phase
from wire.repertory import runtime_pb2 as pb

_count = st.integers(0, 2**32 - 1)
_share = st.floats(0, 1, width=32)
_states = st.builds(
    ModelState,
    model_id=st.text(),
    state=st.sampled_from([CopyState[name] for name, _ in pb.ModelState.State.items()]),
    tier=st.sampled_from([Tier[name] for name, _ in pb.ModelState.Tier.items()]),
    kv_usage=_share,
    progress=_share,
    step_seconds_total=st.floats(0, 1e9),
    swap_in_s=st.floats(0, 1e9),
    load_s=st.floats(0, 1e9),
    tokens_per_s=st.floats(0, 1e9),
    **{field.name: _count for field in msgspec.structs.fields(ModelState) if field.type is int},
    **{
        name: st.text()
        for name in ("progress_text", "quantization", "dtype", "architecture", "path", "error", "devices")
    },
)


@given(_states)
def test_model_state_is_unchanged_by_wire_and_record(state: ModelState) -> None:
    message = pb.RuntimeSnapshot.FromString(pb.RuntimeSnapshot(models=[to_message(state)]).SerializeToString())
    assert SnapshotReader().read(message).models == (state,)
    record = InstanceRecord(copies={"m": state})
    assert decode_record(InstanceRecord, encode_record(record)) == record


def test_model_state_message_and_copy_have_all_fields() -> None:
    fields = set(ModelState.__struct_fields__)
    assert set(pb.ModelState.DESCRIPTOR.fields_by_name) == fields
    body = msgspec.json.decode(msgspec.json.encode(Copy(instance_id="pod", status="LOADED")))
    assert set(body) == fields | {"instance_id", "status"}


@given(st.builds(ModelFigures, kv_usage=_share, running=_count, tier=st.sampled_from([Tier.HOST, Tier.DISK])))
def test_state_of_keeps_the_engines_figures(figures: ModelFigures) -> None:
    view = ModelView(figures.model_id, Phase.LOADED, ModelSettings())
    state = state_of(view, figures, 3.0)
    assert {name: getattr(state, name) for name in ModelFigures.__struct_fields__} == msgspec.structs.asdict(figures)
    assert (state.state, state.tokens_per_s) == (CopyState.LOADED, 3.0)


def test_state_of_a_model_that_is_pulled_or_returns() -> None:
    pulled = state_of(ModelView("m", Phase.PULLING, ModelSettings()), None, 0.0)
    assert (pulled.state, pulled.tier, pulled.progress) == (CopyState.PULLING, Tier.REMOTE, 0.0)
    returning = state_of(ModelView("m", Phase.RETURNING, ModelSettings()), None, 0.0)
    assert (returning.state, returning.tier) == (CopyState.LOADING, Tier.DISK)


def test_settled_state_ignores_figures_of_requests() -> None:
    state = ModelState(model_id="m", tier=Tier.HOST, weight_bytes=7, dtype="float16")
    busy = msgspec.structs.replace(state, running=3, kv_usage=0.5, tokens_per_s=9.0, steps_total=4, progress=0.5)
    assert busy.settled() == state.settled() == state
    assert msgspec.structs.replace(state, tier=Tier.DEVICE).settled() != state


@given(st.lists(st.lists(_states, max_size=3), max_size=3))
def test_snapshot_reader_keeps_the_states_that_a_snapshot_repeats(snapshots: list[list[ModelState]]) -> None:
    reader, known = SnapshotReader(), dict[ModelState, ModelState]()
    for states in snapshots:
        unique = tuple(dict.fromkeys(states))
        found = reader.read(pb.RuntimeSnapshot(models=map(to_message, unique))).models
        assert found == unique
        assert all(known.get(state, state) is state for state in found)
        known = {state: state for state in found}
