"""mmesh.ModelMesh through real stubs: models."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import pytest

from mesh.errors import InvalidRequest
from mesh.registry.secrets import looks_secret, refuse_secrets
from mesh.store.embedded import EmbeddedStore
from mesh.types import ModelInfo
from tests.support.fake_runtime import Switches
from tests.support.mesh_node import NOW_MS, Node, running_node
from tests.support.pods import running_pod
from wire.mmesh import model_mesh_pb2 as pb

S = pb.ModelStatusInfo
INFO = pb.ModelInfo(type="llm", path="hf://org/model", key='{"quantize":"nf4"}')
HOUR_MS = 3_600_000


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    store = EmbeddedStore(tmp_path)
    await store.open()
    async with running_node(store) as node:
        yield node
    await store.close()


def status_of(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> tuple[grpc.StatusCode, str | None]:
    return error.value.code(), error.value.details()


async def test_management_model_from_registration_to_removal(node: Node) -> None:
    assert (await node.mesh.getModelStatus(pb.GetStatusRequest(modelId="m"))).status == S.NOT_FOUND
    assert (await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=INFO))).status == S.NOT_LOADED
    loaded = await node.mesh.ensureLoaded(pb.EnsureLoadedRequest(modelId="m", sync=True))
    assert loaded.status == S.LOADED
    assert [(copy.location, copy.copyStatus) for copy in loaded.modelCopyInfos] == [("pod-a", S.LOADED)]
    assert loaded.modelCopyInfos[0].time > 0
    assert await node.mesh.unregisterModel(pb.UnregisterModelRequest(modelId="m")) == pb.UnregisterModelResponse()
    assert (await node.mesh.getModelStatus(pb.GetStatusRequest(modelId="m"))).status == S.NOT_FOUND
    assert node.registry.models.get("m") is None


async def test_management_refuses_other_attributes_under_one_id(node: Node) -> None:
    for _ in range(2):
        await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=INFO))
    for other in (
        pb.ModelInfo(type="x", path=INFO.path, key=INFO.key),
        pb.ModelInfo(type="llm", path="y"),
        pb.ModelInfo(type="llm"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=other))
        assert status_of(error) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "Model already exists with different attribute values",
        )


@pytest.mark.parametrize(
    ("asked_ms", "load_now", "expected_ms"),
    [(0, False, NOW_MS - 6 * HOUR_MS), (0, True, NOW_MS - HOUR_MS), (NOW_MS + 5, False, NOW_MS), (7, False, 7)],
)
async def test_management_entry_into_the_lru_order(node: Node, asked_ms: int, load_now: bool, expected_ms: int) -> None:
    request = pb.RegisterModelRequest(modelId="m", modelInfo=INFO, loadNow=load_now, lastUsedTime=asked_ms)
    await node.mesh.registerModel(request)
    record = node.registry.models.get("m")
    assert record is not None
    assert record.last_used_ms == expected_ms
    assert node.loader.asked == ([("m", expected_ms, False)] if load_now else [])


async def test_management_repeated_registration_updates_last_use_after_an_hour(node: Node) -> None:
    for last_used_ms, expected_ms in [
        (NOW_MS - 9 * HOUR_MS,) * 2,
        (NOW_MS - 8 * HOUR_MS, NOW_MS - 9 * HOUR_MS),
        (NOW_MS,) * 2,
    ]:
        await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=INFO, lastUsedTime=last_used_ms))
        record = node.registry.models.get("m")
        assert record is not None
        assert record.last_used_ms == expected_ms


@pytest.mark.parametrize("sync", [False, True])
async def test_management_load_now(node: Node, sync: bool) -> None:
    node.loader.held["m"] = asyncio.Event()
    call = node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=INFO, loadNow=True, sync=sync))
    if sync:
        await node.registry.models.table.until("m", lambda record: record is not None and bool(record.instance_ids))
        assert not call.done()
        assert (await node.mesh.getModelStatus(pb.GetStatusRequest(modelId="m"))).status == S.LOADING
        node.loader.held["m"].set()
        assert (await call).status == S.LOADED
    else:
        assert (await call).status == S.LOADING


async def test_management_load_failure_is_a_status_with_its_cause(node: Node) -> None:
    node.loader.broken["m"] = "no config.json in hf://org/model"
    answer = await node.mesh.registerModel(
        pb.RegisterModelRequest(modelId="m", modelInfo=INFO, loadNow=True, sync=True)
    )
    assert answer.status == S.LOADING_FAILED
    assert list(answer.errors) == ["no config.json in hf://org/model"]
    assert [(copy.location, copy.copyStatus) for copy in answer.modelCopyInfos] == [("pod-a", S.LOADING_FAILED)]
    assert (await node.mesh.ensureLoaded(pb.EnsureLoadedRequest(modelId="m", sync=True))).status == S.LOADING_FAILED


async def test_management_ensure_loaded_passes_the_last_use(node: Node) -> None:
    await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=INFO))
    await node.mesh.ensureLoaded(pb.EnsureLoadedRequest(modelId="m"))
    await node.mesh.ensureLoaded(pb.EnsureLoadedRequest(modelId="m", lastUsedTime=5))
    assert node.loader.asked == [("m", NOW_MS, False), ("m", 5, False)]


async def test_management_refuses_invalid_requests(node: Node) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await node.mesh.ensureLoaded(pb.EnsureLoadedRequest(modelId="m"))
    assert status_of(error) == (grpc.StatusCode.NOT_FOUND, "model not found")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=pb.ModelInfo(path="p")))
    assert status_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "Must provide non-empty model type string")
    await node.mesh.unregisterModel(pb.UnregisterModelRequest(modelId="m"))
    empty: list[Awaitable[object]] = [
        node.mesh.registerModel(pb.RegisterModelRequest(modelInfo=INFO)),
        node.mesh.unregisterModel(pb.UnregisterModelRequest()),
        node.mesh.getModelStatus(pb.GetStatusRequest()),
        node.mesh.ensureLoaded(pb.EnsureLoadedRequest()),
    ]
    for call in empty:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert status_of(error) == (grpc.StatusCode.INVALID_ARGUMENT, "must provide non-empty modelId")


async def test_management_deadline_does_not_stop_the_load(node: Node) -> None:
    node.loader.held["m"] = asyncio.Event()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await node.mesh.registerModel(
            pb.RegisterModelRequest(modelId="m", modelInfo=INFO, loadNow=True, sync=True), timeout=0.3
        )
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    node.loader.held["m"].set()
    assert (await node.mesh.ensureLoaded(pb.EnsureLoadedRequest(modelId="m", sync=True))).status == S.LOADED


async def test_management_unreachable_store_is_unavailable(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path)
    await store.open()
    async with running_node(store) as node:
        await node.mesh.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=INFO))
        await store.close()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await node.mesh.registerModel(pb.RegisterModelRequest(modelId="n", modelInfo=INFO))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await node.mesh.getModelStatus(pb.GetStatusRequest(modelId="m"))).status == S.NOT_LOADED


async def test_management_registrations_survive_a_restart(tmp_path: Path) -> None:
    for attempt in range(2):
        store = EmbeddedStore(tmp_path)
        await store.open()
        async with running_node(store) as node:
            if attempt == 0:
                await node.mesh.registerModel(pb.RegisterModelRequest(modelId="org/m", modelInfo=INFO))
            assert (await node.mesh.getModelStatus(pb.GetStatusRequest(modelId="org/m"))).status == S.NOT_LOADED
            assert node.registry.names() == ["org/m"]
        await store.close()


async def test_management_refuses_a_secret_without_repeating_it(node: Node) -> None:
    key = json.dumps({"storage_params": {"type": "s3", "secret_access_key": "hunter2"}})
    requests = (
        node.mesh.registerModel(
            pb.RegisterModelRequest(modelId="m", modelInfo=pb.ModelInfo(type="llm", path="p", key=key))
        ),
        node.mesh.setVModel(
            pb.SetVModelRequest(vModelId="v", targetModelId="m", modelInfo=pb.ModelInfo(type="llm", path="p", key=key))
        ),
    )
    for call in requests:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        code, text = status_of(error)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text is not None
        assert "storage_params.secret_access_key" in text
        assert "storage_key" in text
        assert "hunter2" not in text
    assert node.registry.models.get("m") is None


@pytest.mark.parametrize(
    "name",
    [
        "secret_access_key",
        "token",
        "HF_TOKEN",
        "hf-token",
        "password",
        "private_key",
        "client_secret",
        "connection_string",
        "apiKey",
        "api_key",
        "secretAccessKey",
        "sas_token",
        "headers.Authorization",
        "account_key",
        "session_token",
        "client_key",
        "x.passphrase",
        "X-Amz-Signature",
    ],
)
def test_looks_secret(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "access_key_id",
        "storage_key",
        "token_uri",
        "client_email",
        "max_tokens",
        "eos_token",
        "bucket",
        "endpoint_url",
        "type",
        "tokenizer",
        "chat_template",
        "client_id",
        "key",
        "secretary",
        "region",
        "display_name",
    ],
)
def test_does_not_look_secret(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize(
    "path",
    ["https://user:pw@host/m", "https://host/m?sig=abc", "https://host/m?X-Amz-Signature=abc", "s3://h/m?token=x"],
)
def test_secrets_in_a_path_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="the path contains a secret"):
        refuse_secrets("m", ModelInfo("llm", path))


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"headers": '{"Authorization": "Bearer hunter2"}'}, r"storage_params\.headers\.Authorization"),
        ({"type": "http", "url": "https://user:hunter2@host/m"}, r"storage_params\.url"),
        ({"type": "http", "url": "https://host/m?sig=hunter2"}, r"storage_params\.url"),
    ],
)
def test_secrets_inside_a_parameter_are_refused(params: dict[str, str], named: str) -> None:
    key = json.dumps({"storage_params": params})
    with pytest.raises(InvalidRequest, match=named) as caught:
        refuse_secrets("m", ModelInfo("llm", "m", key))
    assert "hunter2" not in str(caught.value)


def test_secrets_refuses_an_endlessly_nested_key() -> None:
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    for key in (deep, json.dumps({"storage_params": {"a": deep}})):
        with pytest.raises(InvalidRequest, match="nested too deeply"):
            refuse_secrets("m", ModelInfo("llm", "m", key))


@pytest.mark.parametrize(
    "key", ["", "not json", "[]", "7", '{"storage_key":"k","storage_params":{"token":""}}', '{"quantize":"int8"}']
)
def test_secrets_accepts_a_key_without_one(key: str) -> None:
    refuse_secrets("m", ModelInfo("llm", "hf://org/m@main?x=1", key))


@pytest.mark.parametrize(
    ("foreign", "model_type", "refused"), [(False, "llm", True), (False, "sklearn", False), (True, "llm", False)]
)
async def test_management_checks_keys_of_the_own_runtime_only(
    tmp_path: Path, foreign: bool, model_type: str, refused: bool
) -> None:
    info = pb.ModelInfo(type=model_type, path="/m", key='{"sampling": {"top_p": 0}}')
    async with running_pod(tmp_path / "pod", foreign=foreign) as pod:
        calls = (
            pod.management.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=info)),
            pod.management.setVModel(pb.SetVModelRequest(vModelId="v", targetModelId="t", modelInfo=info)),
        )
        answers = await asyncio.gather(*calls, return_exceptions=True)
        registered = [pod.pod.registry.models.get(model_id) is not None for model_id in ("m", "t")]
    assert registered == [not refused, not refused]
    for answer in answers:
        if refused:
            assert isinstance(answer, grpc.aio.AioRpcError)
            assert answer.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "model key: sampling.top_p is 0" in (answer.details() or "")
        else:
            assert not isinstance(answer, BaseException)


async def test_management_takes_the_name_that_one_calls(tmp_path: Path) -> None:
    """A name that `register` has made is a vmodel over a concrete id, and an alias another one."""
    async with running_pod(tmp_path / "pod") as pod:
        model_id = (await pod.name("smol", "/files"))["model_id"]
        async with pod.http.put("/admin/v1/aliases/also", json={"target": "smol"}) as answer:
            assert answer.status == 204
        for name in ("smol", "also", model_id):
            assert (await pod.management.getModelStatus(pb.GetStatusRequest(modelId=name))).status == S.NOT_LOADED
        assert (await pod.load("also")).status == S.LOADED
        for name in ("smol", "also", model_id):
            assert (await pod.management.getModelStatus(pb.GetStatusRequest(modelId=name))).status == S.LOADED
        assert list(pod.runtime.loaded) == [model_id]
        assert (await pod.management.getModelStatus(pb.GetStatusRequest(modelId="nobody"))).status == S.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await pod.load("nobody")
        assert status_of(error) == (grpc.StatusCode.NOT_FOUND, "model not found")


UNPACKED = {"unpacked_blocks": "Q4_K", "stored_bytes": 5 << 20, "weight_bytes": 16 << 20, "nf4_weight_bytes": 6 << 20}
COST = 'm: 5.0 MiB of Q4_K blocks are unpacked to 16 MiB when the model is loaded; "quantize": "nf4" in its key takes 6.0 MiB'


@pytest.mark.parametrize(
    ("path", "warning"), [("/q.gguf", COST), ("hf://org/model-GGUF", COST), ("/as-it-is.gguf", None), ("/m", None)]
)
async def test_management_warns_of_gguf_files_that_are_unpacked(tmp_path: Path, path: str, warning: str | None) -> None:
    switches = Switches(unpacking={"/q.gguf": UNPACKED, "hf://org/model-GGUF": UNPACKED})
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        info = pb.ModelInfo(type="llm", path=path, key="{}")
        call = pod.management.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=info))
        assert (await call).status == S.NOT_LOADED
        assert dict(await call.trailing_metadata() or ()).get("warning") == warning
        move = pod.management.setVModel(pb.SetVModelRequest(vModelId="v", targetModelId="m", modelInfo=info))
        await move
        assert dict(await move.trailing_metadata() or ()).get("warning") == warning
        assert {fit.model_path for fit in pod.runtime.fits} == ({path} if "gguf" in path.lower() else set())


async def test_management_warns_of_a_model_whose_id_is_not_ascii(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(unpacking={"/q.gguf": UNPACKED})) as pod:
        info = pb.ModelInfo(type="llm", path="/q.gguf", key="{}")
        call = pod.management.registerModel(pb.RegisterModelRequest(modelId="mü", modelInfo=info))
        assert (await call).status == S.NOT_LOADED
        assert str(dict(await call.trailing_metadata() or ())["warning"]).startswith("m\\xfc: 5.0 MiB")


async def test_management_registers_a_gguf_file_that_the_runtime_cannot_read(tmp_path: Path) -> None:
    switches = Switches(invalid={"/q.gguf": "quantize is nf4, and it is stored in int8 already"})
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        info = pb.ModelInfo(type="llm", path="/q.gguf", key="{}")
        call = pod.management.registerModel(pb.RegisterModelRequest(modelId="m", modelInfo=info))
        assert (await call).status == S.NOT_LOADED
        assert "warning" not in dict(await call.trailing_metadata() or ())
