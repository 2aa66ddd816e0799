"""vmodels: the management API's words and texts, and moves from their beginning to every end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.errors import AlreadyExists, InvalidRequest, NotFound
from mesh.registry.registration import belongs_to, concrete_id, model_info
from mesh.store.embedded import EmbeddedStore
from mesh.types import ModelInfo, ModelStatus
from tests.support.mesh_node import NOW_MS, Node, running_node
from tests.support.waiting import until
from wire.mmesh import model_mesh_pb2 as pb

V = pb.VModelStatusInfo
S = pb.ModelStatusInfo


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    store = EmbeddedStore(tmp_path)
    await store.open()
    async with running_node(store) as node:
        yield node
    await store.close()


def vmodel_request(
    target: str, *, vmodel: str = "v", info: bool = True, auto: bool = True, path: str = "", **more: Any
) -> pb.SetVModelRequest:
    model_info = pb.ModelInfo(type="llm", path=path or f"/models/{target}") if info else None
    return pb.SetVModelRequest(
        vModelId=vmodel, targetModelId=target, modelInfo=model_info, autoDeleteTargetModel=auto, **more
    )


async def status(node: Node, vmodel: str = "v", owner: str = "") -> pb.VModelStatusInfo:
    return await node.mesh.getVModelStatus(pb.GetVModelStatusRequest(vModelId=vmodel, owner=owner))


def refs(node: Node, model_id: str) -> int | None:
    record = node.registry.models.get(model_id)
    return record.refs if record else None


async def refused(call: object, code: grpc.StatusCode, text: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    assert (error.value.code(), error.value.details()) == (code, text)


async def test_set_vmodel_creates_the_vmodel_and_its_target(node: Node) -> None:
    made = await node.mesh.setVModel(vmodel_request("m1"))
    assert (made.status, made.activeModelId, made.targetModelId, made.owner) == (V.DEFINED, "m1", "m1", "repertory")
    assert made.activeModelStatus.status == S.NOT_LOADED
    assert refs(node, "m1") == 1
    assert node.registry.resolve("v") == "m1"
    assert await node.mesh.setVModel(vmodel_request("m1")) == made
    assert refs(node, "m1") == 1
    await refused(
        node.mesh.unregisterModel(pb.UnregisterModelRequest(modelId="m1")),
        grpc.StatusCode.FAILED_PRECONDITION,
        "Model m1 has referents",
    )


async def test_move_waits_for_its_target_and_deletes_the_old_one(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
    node.loader.held["m2"] = asyncio.Event()
    moving = await node.mesh.setVModel(vmodel_request("m2"))
    assert (moving.status, moving.activeModelId, moving.targetModelId) == (V.TRANSITIONING, "m1", "m2")
    assert moving.activeModelStatus.status == S.LOADED
    assert (refs(node, "m1"), refs(node, "m2")) == (1, 1)
    assert node.registry.resolve("v") == "m1"
    waiting = asyncio.ensure_future(node.mesh.setVModel(vmodel_request("m2", sync=True)))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.1)
    node.loader.held["m2"].set()
    done = await waiting
    assert (done.status, done.activeModelId, done.targetModelId) == (V.DEFINED, "m2", "m2")
    assert not done.HasField("targetModelStatus")
    assert node.registry.resolve("v") == "m2"
    assert (refs(node, "m1"), refs(node, "m2")) == (None, 1)
    assert [asked[0] for asked in node.loader.asked] == ["m1", "m2"]


async def test_move_gives_the_target_the_last_use_of_the_active_model(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
    await node.registry.models.touch("m1", NOW_MS + 77)
    await node.mesh.setVModel(vmodel_request("m2", sync=True))
    record = node.registry.models.get("m2")
    assert record is not None
    assert record.last_used_ms == NOW_MS + 77


async def test_move_keeps_a_target_without_auto_delete(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", auto=False, loadNow=True, sync=True))
    await node.mesh.setVModel(vmodel_request("m2", sync=True))
    assert refs(node, "m1") == 0
    await node.mesh.unregisterModel(pb.UnregisterModelRequest(modelId="m1"))
    assert refs(node, "m1") is None


async def test_move_of_an_unloaded_vmodel_is_immediate(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1"))
    moved = await node.mesh.setVModel(vmodel_request("m2"))
    assert (moved.status, moved.activeModelId) == (V.DEFINED, "m2")
    assert node.loader.asked == []
    assert refs(node, "m1") is None


async def test_move_to_a_loaded_target_or_by_force_is_immediate(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", auto=False, loadNow=True, sync=True))
    await node.mesh.registerModel(
        pb.RegisterModelRequest(
            modelId="m2", modelInfo=pb.ModelInfo(type="llm", path="/models/m2"), loadNow=True, sync=True
        )
    )
    assert (await node.mesh.setVModel(vmodel_request("m2", info=False))).status == V.DEFINED
    node.loader.held["m3"] = asyncio.Event()
    assert (await node.mesh.setVModel(vmodel_request("m3"))).status == V.TRANSITIONING
    forced = await node.mesh.setVModel(vmodel_request("m3", force=True))
    assert (forced.status, forced.activeModelId) == (V.DEFINED, "m3")
    assert (refs(node, "m2"), refs(node, "m3")) == (0, 1)


async def test_move_is_parked_by_a_failed_load_and_tried_again(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
    node.loader.broken["m2"] = "no such file"
    parked = await node.mesh.setVModel(vmodel_request("m2", sync=True))
    assert (parked.status, parked.activeModelId, parked.targetModelId) == (V.TRANSITION_FAILED, "m1", "m2")
    assert list(parked.targetModelStatus.errors) == ["no such file"]
    assert node.registry.resolve("v") == "m1"
    await node.mesh.setVModel(vmodel_request("m1", vmodel="other", loadNow=True, sync=True))
    assert [asked[0] for asked in node.loader.asked if asked[0] == "m2"] == ["m2"]
    del node.loader.broken["m2"]
    await node.loader.expire_failure("m2")
    async with asyncio.timeout(10):
        await node.registry.vmodels.table.until("v", lambda vmodel: vmodel is not None and not vmodel.is_moving)
    assert (await status(node)).status == V.DEFINED
    assert node.registry.resolve("v") == "m2"


async def test_set_vmodel_again_leaves_a_parked_move_to_the_sweep(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
    node.loader.broken["m2"] = "no such file"
    for _ in range(2):
        assert (await node.mesh.setVModel(vmodel_request("m2", sync=True))).status == V.TRANSITION_FAILED
        assert [asked[0] for asked in node.loader.asked].count("m2") == 1
    del node.loader.broken["m2"]
    node.transitions.sweep()
    async with asyncio.timeout(10):
        await node.registry.vmodels.table.until("v", lambda vmodel: vmodel is not None and not vmodel.is_moving)


async def test_move_back_drops_the_other_target(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
    node.loader.broken["m2"] = "no such file"
    await node.mesh.setVModel(vmodel_request("m2", sync=True))
    back = await node.mesh.setVModel(vmodel_request("m1"))
    assert (back.status, back.activeModelId, back.targetModelId) == (V.DEFINED, "m1", "m1")
    assert (refs(node, "m1"), refs(node, "m2")) == (1, None)


async def test_move_replaces_a_move_in_progress(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
    node.loader.held["m2"] = asyncio.Event()
    await node.mesh.setVModel(vmodel_request("m2"))
    done = await node.mesh.setVModel(vmodel_request("m3", sync=True))
    assert (done.status, done.activeModelId) == (V.DEFINED, "m3")
    node.loader.held["m2"].set()
    await until(lambda: not node.loader.is_loading("m2"))
    assert node.registry.resolve("v") == "m3"
    assert (refs(node, "m1"), refs(node, "m2"), refs(node, "m3")) == (None, None, 1)


async def test_move_in_progress_continues_after_a_restart(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    async with running_node(store) as node:
        await node.mesh.setVModel(vmodel_request("m1", loadNow=True, sync=True))
        node.loader.held["m2"] = asyncio.Event()
        await node.mesh.setVModel(vmodel_request("m2"))
    async with running_node(store) as node:
        async with asyncio.timeout(10):
            await node.registry.vmodels.table.until("v", lambda vmodel: vmodel is not None and not vmodel.is_moving)
        assert node.registry.resolve("v") == "m2"
    await store.close()


async def test_set_vmodel_refuses_invalid_requests(node: Node) -> None:
    await refused(
        node.mesh.setVModel(vmodel_request("m1", vmodel="")), grpc.StatusCode.INVALID_ARGUMENT, "Must provide vModelId"
    )
    await refused(
        node.mesh.setVModel(vmodel_request("")),
        grpc.StatusCode.INVALID_ARGUMENT,
        "Must provide target modelId for vmodel v",
    )
    await refused(
        node.mesh.setVModel(vmodel_request("m1", info=False)), grpc.StatusCode.NOT_FOUND, "Target model m1 not found"
    )
    await refused(
        node.mesh.setVModel(vmodel_request("m1", updateOnly=True)), grpc.StatusCode.NOT_FOUND, "vmodel v not found"
    )
    empty_type = pb.SetVModelRequest(vModelId="v", targetModelId="m1", modelInfo=pb.ModelInfo(path="p"))
    await refused(
        node.mesh.setVModel(empty_type), grpc.StatusCode.INVALID_ARGUMENT, "Must provide non-empty model type string"
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await node.mesh.setVModel(vmodel_request("m1", expectedTargetModelId="m0"))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert node.registry.models.table.items() == []
    await node.mesh.setVModel(vmodel_request("m1", expectedTargetModelId="m1"))
    await refused(
        node.mesh.setVModel(vmodel_request("m1", path="other")),
        grpc.StatusCode.ALREADY_EXISTS,
        "Target model m1 already exists with different attribute values",
    )
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await node.mesh.setVModel(vmodel_request("m2", expectedTargetModelId="m0"))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (await node.mesh.setVModel(vmodel_request("m2", expectedTargetModelId="m1"))).targetModelId == "m2"
    assert (await node.mesh.setVModel(vmodel_request("m2", expectedTargetModelId="m0"))).targetModelId == "m2"


async def test_vmodels_of_other_owners_are_refused(node: Node) -> None:
    assert (await node.mesh.setVModel(vmodel_request("m1", owner="isvc"))).owner == "isvc"
    assert (await node.mesh.setVModel(vmodel_request("m1"))).owner == "isvc"
    await refused(
        node.mesh.setVModel(vmodel_request("m1", owner="other")),
        grpc.StatusCode.ALREADY_EXISTS,
        'vmodel v already exists with different owner "isvc"',
    )
    assert (await status(node, owner="isvc")).status == V.DEFINED
    assert await status(node, owner="other") == V()
    await node.mesh.deleteVModel(pb.DeleteVModelRequest(vModelId="v", owner="other"))
    assert (await status(node)).status == V.DEFINED


async def test_delete_vmodel_removes_its_models(node: Node) -> None:
    await node.mesh.setVModel(vmodel_request("kept", vmodel="a", auto=False))
    await node.mesh.setVModel(vmodel_request("gone", vmodel="b"))
    await node.mesh.setVModel(vmodel_request("gone", vmodel="c", info=False))
    for vmodel in ("a", "b", "b", "never"):
        await node.mesh.deleteVModel(pb.DeleteVModelRequest(vModelId=vmodel))
    assert (refs(node, "kept"), refs(node, "gone")) == (0, 1)
    await node.mesh.deleteVModel(pb.DeleteVModelRequest(vModelId="c"))
    assert (refs(node, "kept"), refs(node, "gone")) == (0, None)
    assert await status(node, "b") == V()


async def test_concurrent_moves_keep_reference_counts(node: Node) -> None:
    """Ten callers, four vmodels, three targets: the counts are right at the end, in any order."""
    calls = [
        node.mesh.setVModel(vmodel_request(f"m{number % 3}", vmodel=f"v{number % 4}", force=number % 2 == 0))
        for number in range(24)
    ]
    calls += [node.mesh.deleteVModel(pb.DeleteVModelRequest(vModelId=f"v{number % 4}")) for number in range(3)]  # type: ignore[misc]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    pointed = [{vmodel.active_id, vmodel.target_id} for _, vmodel in node.registry.vmodels.table.items()]
    for number in range(3):
        count = sum(f"m{number}" in ids for ids in pointed)
        assert refs(node, f"m{number}") == (count or None)


def info(path: str, **settings: object) -> ModelInfo:
    return model_info("smol", path, settings)


async def register(node: Node, name: str, what: ModelInfo) -> str:
    return await node.registry.register_name(
        name, what, now_ms=NOW_MS, is_loaded=lambda model_id: node.loader.status(model_id).status is ModelStatus.LOADED
    )


async def test_register_name_replaces_files_without_a_gap(node: Node) -> None:
    first = await register(node, "org/smol", info("/a"))
    assert first == concrete_id("org/smol", info("/a"))
    assert await register(node, "org/smol", info("/a")) == first
    assert node.registry.names() == ["org/smol"]
    await node.loader.ensure_loaded(first, wait=True)
    gate = node.loader.held[concrete_id("org/smol", info("/b"))] = asyncio.Event()
    second = await register(node, "org/smol", info("/b"))
    await until(lambda: node.loader.is_loading(second))
    assert node.registry.resolve("org/smol") == first
    named = node.registry.named()[0]
    assert (named.name, named.model_id, named.target_id, named.record.path) == ("org/smol", first, second, "/a")
    gate.set()
    async with asyncio.timeout(10):
        await node.registry.vmodels.table.until("org/smol", lambda vmodel: vmodel is not None and not vmodel.is_moving)
    assert node.registry.resolve("org/smol") == second
    assert node.registry.models.get(first) is None
    assert node.registry.name_of(second) == "org/smol"


async def test_register_name_with_other_settings_makes_another_model(node: Node) -> None:
    assert info("/a", quantize="nf4") != info("/a")
    assert info("/a", sampling={"top_k": 5, "temperature": 0.5}) == info(
        "/a", sampling={"temperature": 0.5, "top_k": 5}
    )
    assert info("/a", version="2") != info("/a")
    name = concrete_id("smol", info("/a"))
    assert belongs_to(name, "smol")
    assert not belongs_to(name, "smo")
    assert not belongs_to("smol__v2", "smol")


async def test_names_aliases_and_removal_are_consistent(node: Node) -> None:
    smol = await register(node, "smol", info("/a"))
    await node.mesh.registerModel(
        pb.RegisterModelRequest(modelId="plain", modelInfo=pb.ModelInfo(type="llm", path="/p"))
    )

    async def alias(name: str, target: str) -> str:
        return await node.registry.set_alias(name, target, now_ms=NOW_MS, is_loaded=lambda _: False)

    assert await alias("best", "smol") == smol
    assert [(named.name, named.model_id, named.aliases) for named in node.registry.named()] == [
        ("best", smol, ("smol",)),
        ("plain", "plain", ()),
        ("smol", smol, ("best",)),
    ]
    assert await alias("best", "plain") == "plain"
    assert node.registry.resolve("best") == "plain"
    with pytest.raises(AlreadyExists, match="smol is a registered model"):
        await alias("smol", "plain")
    with pytest.raises(AlreadyExists, match="plain is a registered model"):
        await alias("plain", "smol")
    with pytest.raises(NotFound, match="model not found: 'none'; served here: best, plain, smol"):
        await alias("x", "none")
    with pytest.raises(AlreadyExists, match="plain is already registered"):
        await register(node, "plain", info("/other"))
    with pytest.raises(InvalidRequest):
        await register(node, "a b", info("/other"))
    for name in ("best", "smol", "plain"):
        await node.registry.remove_name(name)
    with pytest.raises(NotFound, match="no model is registered"):
        await node.registry.remove_name("smol")
    assert node.registry.models.table.items() == []


async def test_resolve_finds_a_name_that_another_pod_just_registered(node: Node, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        node.registry.resolve("smol")
    await register(node, "smol", info("/a"))
    assert await node.registry.resolve_fresh("smol") == node.registry.resolve("smol")
    assert node.registry.resolve_vmodel("smol") == node.registry.resolve("smol")
    with pytest.raises(NotFound, match="vmodel not found"):
        node.registry.resolve_vmodel("other")
