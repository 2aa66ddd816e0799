"""The settings of a model that may change while it is loaded: they are no part of its identity, on any surface."""

import json
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model_key import CopySettings
from mesh.registry.copy_settings import DEFAULT, copy_settings_of, identity_of, is_same_model
from mesh.registry.models import new_model, with_copy_settings
from mesh.registry.records import ModelRecord, decode_record, encode_record
from mesh.registry.registration import concrete_id, model_info
from mesh.types import ModelInfo
from tests.support.pods import RunningPod, running_pod
from wire.mmesh import model_mesh_pb2 as mm

copies = st.fixed_dictionaries(
    {},
    optional={
        "min_copies": st.integers(0, 5),
        "max_copies": st.integers(1, 5),
        "pinned": st.booleans(),
        "priority": st.integers(-100, 100),
        "idle_timeout_s": st.floats(0.5, 1000),
    },
)
others = st.fixed_dictionaries(
    {}, optional={"quantize": st.sampled_from(["nf4", "int8"]), "max_model_len": st.integers(1, 4096)}
)


@given(others, copies, copies)
def test_copy_settings_do_not_change_the_id(
    files: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> None:
    old, new = (model_info("m", "/files", {**files, **given}) for given in (before, after))
    assert concrete_id("m", old) == concrete_id("m", new) == concrete_id("m", model_info("m", "/files", files))
    assert is_same_model(old, new)
    assert identity_of(old) == identity_of(new)
    record = with_copy_settings(new_model(old, last_used_ms=1), new)
    assert record.copy_settings == CopySettings(**after)
    assert decode_record(ModelRecord, encode_record(record)) == record
    assert record.info == identity_of(old)


@given(others, others)
def test_model_id_changes_with_other_settings(one: dict[str, Any], other: dict[str, Any]) -> None:
    infos = [model_info("m", "/files", settings) for settings in (one, other)]
    assert is_same_model(*infos) == (one == other)
    assert (concrete_id("m", infos[0]) == concrete_id("m", infos[1])) == (one == other)


def test_copy_settings_may_be_the_only_settings_of_a_key() -> None:
    bare, pinned = ModelInfo("llm", "/m"), ModelInfo("llm", "/m", '{"pinned": true}')
    assert is_same_model(bare, pinned)
    assert is_same_model(pinned, bare)
    assert is_same_model(ModelInfo("llm", "/m", "{}"), pinned)
    assert not is_same_model(bare, ModelInfo("llm", "/m", '{"pinned": true, "quantize": "nf4"}'))
    assert not is_same_model(bare, ModelInfo("llm", "/m", "{}")), "ModelMesh takes these for different"


def test_copy_settings_of_earlier_records_and_of_keys_of_other_runtimes() -> None:
    earlier = ModelRecord(type="llm", path="/m", key='{"pinned": true, "quantize": "nf4"}')
    assert earlier.copy_settings == CopySettings(pinned=True)
    assert json.loads(earlier.info.key) == {"quantize": "nf4"}
    foreign = ModelInfo("sklearn", "/m", '{"pinned": "by its own meaning", "rows": 3}')
    assert identity_of(foreign) == foreign
    assert copy_settings_of(foreign) == DEFAULT
    opaque = ModelInfo("sklearn", "/m", "min_copies")
    assert (identity_of(opaque), copy_settings_of(opaque)) == (opaque, DEFAULT)
    assert not is_same_model(opaque, ModelInfo("sklearn", "/m", "max_copies"))


def loads_of(pod: RunningPod) -> list[tuple[str, str]]:
    return [entry for entry in pod.runtime.log if entry[0] != "purge"]


async def test_copy_settings_change_by_http_without_a_load(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "a") as pod:
        first = await pod.name("m", "/m", quantize="nf4", load=True)
        await pod.load("m__" + first["model_id"].rpartition("__")[2])
        before = loads_of(pod)
        second = await pod.name("m", "/m", quantize="nf4", pinned=True, priority=3, idle_timeout_s=60)
        assert second["model_id"] == first["model_id"]
        assert second["settings"] == {"quantize": "nf4", "pinned": True, "priority": 3, "idle_timeout_s": 60.0}
        usage = next(model for model in pod.pod.copies.usage().models)
        assert (usage.is_pinned, usage.priority) == (True, 3)
        third = await pod.name("m", "/m", quantize="nf4")
        assert third["settings"] == {"quantize": "nf4"}
        assert third["status"] == "LOADED"
        assert loads_of(pod) == before


@pytest.mark.parametrize("surface", ["registerModel", "setVModel"])
async def test_copy_settings_change_by_grpc_without_a_load(tmp_path: Path, surface: str) -> None:
    async with running_pod(tmp_path / "a") as pod:

        async def register(key: str) -> None:
            info = mm.ModelInfo(type="llm", path="/m", key=key)
            if surface == "registerModel":
                await pod.management.registerModel(mm.RegisterModelRequest(modelId="m", modelInfo=info))
            else:
                await pod.management.setVModel(
                    mm.SetVModelRequest(vModelId="v", targetModelId="m", modelInfo=info, autoDeleteTargetModel=True)
                )

        await register('{"quantize": "nf4", "min_copies": 1}')
        await pod.load("m")
        before = loads_of(pod)
        await register('{"quantize": "nf4", "priority": 7, "pinned": true}')
        assert pod.pod.copies.settings_of("m") == CopySettings(priority=7, pinned=True)
        await register('{"quantize": "nf4"}')
        assert pod.pod.copies.settings_of("m") == DEFAULT
        with pytest.raises(grpc.aio.AioRpcError, match="different attribute values"):
            await register('{"quantize": "fp4"}')
        assert loads_of(pod) == before
