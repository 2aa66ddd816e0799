"""Requests that select an adapter beside their model: which name is called, what is registered on the way, and what is refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.access.api_keys import digest_of
from mesh.api.adapter_choice import AdapterChoice, AdapterFields, choice_of
from mesh.errors import InvalidRequest, NotSupported
from tests.support.pods import RunningPod, running_pod
from wire.fmaas import generation_pb2 as fmaas


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod") as running:
        await running.name("base", "/base")
        await running.name("other", "/other")
        await running.name("sql", "/adapters/sql", adapter_of="base")
        async with running.http.put("/admin/v1/aliases/stable", json={"target": "sql"}) as answer:
            assert answer.status == 204
        yield running


async def called(pod: RunningPod, model: str | None, **fields: Any) -> str:
    """The concrete id that answers a chat."""
    status, answer, _ = await pod.chat(model, **fields)  # type: ignore[arg-type]
    assert status == 200, answer
    return str(answer["answer"])


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        (AdapterFields(), None),
        (AdapterFields(adapter_id="", adapter_source="hub", lora_request={}), None),
        (AdapterFields(adapter_id="sql"), AdapterChoice("adapter_id", "sql")),
        (AdapterFields(adapter_id="org/sql", adapter_source="hub"), AdapterChoice("adapter_id", "org/sql", "hf://org/sql")),
        (AdapterFields(adapter_id="/m/sql", adapter_source="local"), AdapterChoice("adapter_id", "m/sql", "/m/sql")),
        (AdapterFields(adapter_id="s3://b/sql", adapter_source="s3"), AdapterChoice("adapter_id", "b/sql", "s3://b/sql")),
        (AdapterFields(adapter_id="b/sql", adapter_source="s3"), AdapterChoice("adapter_id", "b/sql", "s3://b/sql")),
        (AdapterFields(lora_request={"lora_name": "sql", "lora_int_id": 1}), AdapterChoice("lora_request", "sql")),
        (
            AdapterFields(lora_request={"lora_name": "sql", "lora_path": "/m/sql"}),
            AdapterChoice("lora_request", "sql", "/m/sql"),
        ),
    ],
)  # fmt: skip
def test_choice_of_reads_each_servers_fields(fields: AdapterFields, choice: AdapterChoice | None) -> None:
    assert choice_of(fields) == choice


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        (AdapterFields(adapter_id=5), InvalidRequest, "adapter_id must be a string"),
        (AdapterFields(adapter_id="a", adapter_source=5), InvalidRequest, "adapter_source must be a string"),
        (AdapterFields(adapter_id="a", adapter_source="pbase"), NotSupported, "send hub, local or s3"),
        (AdapterFields(adapter_parameters={"ids": ["a"]}), NotSupported, "adapters are not merged"),
        (AdapterFields(lora_request="sql"), InvalidRequest, "lora_request is not as expected"),
        (AdapterFields(lora_request={"name": "sql"}), InvalidRequest, "lora_name"),
    ],
)
def test_choice_of_refuses_by_name(fields: AdapterFields, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        choice_of(fields)


async def test_adapter_id_calls_the_registered_adapter(pod: RunningPod) -> None:
    base, sql = [(await pod.model(name))["model_id"] for name in ("base", "sql")]
    assert await called(pod, "base", adapter_id="sql") == sql
    assert await called(pod, "base", adapter_id="stable") == sql
    assert await called(pod, "base", lora_request={"lora_name": "sql", "lora_int_id": 3}) == sql
    assert await called(pod, "sql", adapter_id="sql") == sql
    assert await called(pod, None, adapter_id="sql") == sql
    for nothing in ({}, {"adapter_id": ""}, {"adapter_id": None}, {"adapter_id": "base"}, {"lora_request": None}):
        assert await called(pod, "base", **nothing) == base


@pytest.mark.parametrize(
    ("model", "fields", "status", "named"),
    [
        ("base", {"adapter_id": "nobody"}, 400, "adapter_id: 'nobody' is not registered; register it as an adapter of 'base'"),
        ("other", {"adapter_id": "sql"}, 400, "adapter_id: 'sql' is not an adapter of 'other'"),
        ("base", {"adapter_id": "other"}, 400, "'other' is not an adapter of 'base'"),
        ("nobody", {"adapter_id": "sql"}, 404, "'nobody'"),
        ("base", {"lora_request": {"lora_name": "sql", "lora_path": "/evil"}}, 400, "registered with files from elsewhere"),
        ("base", {"adapter_id": "../x", "adapter_source": "local"}, 400, "may not begin"),
    ],
)  # fmt: skip
async def test_adapters_that_do_not_suit_the_model_are_refused(
    pod: RunningPod, model: str, fields: dict[str, Any], status: int, named: str
) -> None:
    found, answer, _ = await pod.chat(model, **fields)
    assert (found, named in answer["error"]["message"]) == (status, True), answer
    assert not pod.runtime.loaded


async def test_adapter_source_registers_the_adapter_on_its_first_call(pod: RunningPod) -> None:
    for _ in range(2):
        answered = await called(pod, "base", adapter_id="/adapters/new", adapter_source="local")
    view = await pod.model("adapters/new")
    assert (view["model_id"], view["uri"], view["settings"]) == (answered, "/adapters/new", {"adapter_of": "base"})


async def test_adapter_source_takes_the_right_to_management(tmp_path: Path) -> None:
    keys = [
        {"name": "caller", "sha256": digest_of("caller"), "scopes": ["inference"]},
        {
            "name": "team",
            "sha256": digest_of("team"),
            "scopes": ["inference", "management"],
            "models": ["base", "team/*"],
        },
    ]
    (tmp_path / "keys.json").write_text(json.dumps({"keys": keys}))
    async with running_pod(tmp_path / "pod", api_keys=("all",), api_keys_file=str(tmp_path / "keys.json")) as running:
        running.http.headers["Authorization"] = "Bearer all"
        await running.name("base", "/base")
        for key, name, status in (
            ("caller", "/team/a", 403),
            ("team", "/others/a", 403),
            ("team", "/team/a", 200),
            ("caller", "/team/a", 200),
        ):
            running.http.headers["Authorization"] = f"Bearer {key}"
            found, answer, _ = await running.chat("base", adapter_id=name, adapter_source="local")
            assert found == status, (key, name, answer)


async def test_tgi_selects_an_adapter_below_the_path_of_its_base(pod: RunningPod) -> None:
    sql = (await pod.model("sql"))["model_id"]
    for path, headers in (("/tgi/base/generate", {}), ("/generate", {"mm-model-id": "base"}), ("/generate", {})):
        async with pod.http.post(path, json={"parameters": {"adapter_id": "sql"}}, headers=headers) as answer:
            assert (await answer.json())["answer"] == sql, path
    async with pod.http.post("/tgi/other/generate", json={"parameters": {"adapter_id": "sql"}}) as answer:
        assert answer.status == 422


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Generate", fmaas.BatchedGenerationRequest(adapter_id="sql", prefix_id="nobody")),
        ("Generate", fmaas.BatchedGenerationRequest(prefix_id="sql")),
        ("GenerateStream", fmaas.SingleGenerationRequest(adapter_id="sql")),
        ("Tokenize", fmaas.BatchedTokenizeRequest(adapter_id="sql")),
        ("Tokenize", fmaas.BatchedTokenizeRequest(prefix_id="sql")),
    ],
)
async def test_tgis_selects_an_adapter_by_either_field(pod: RunningPod, method: str, message: Any) -> None:
    sql = (await pod.model("sql"))["model_id"]
    for metadata in ((("mm-model-id", "base"),), ()):
        if not metadata:
            message.model_id = "base"
        sent = message.SerializeToString()
        call = pod.server_stream(f"/fmaas.GenerationService/{method}")(sent, metadata=metadata)
        assert [answer async for answer in call] == [sent]
        assert dict(pod.runtime.metadata[-1])["mm-model-id"] == sql
    for name, base in (("nobody", "base"), ("sql", "other")):
        wrong = fmaas.BatchedGenerationRequest(adapter_id=name).SerializeToString()
        call = pod.server_stream("/fmaas.GenerationService/Generate")(wrong, metadata=(("mm-model-id", base),))
        with pytest.raises(grpc.aio.AioRpcError, match=f"adapter_id: '{name}' is not") as refused:
            [answer async for answer in call]
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_adapter_choice_leaves_the_fields_of_a_foreign_runtime(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "foreign", foreign=True) as running:
        await running.register("m")
        assert await called(running, "m", adapter_id=5, adapter_parameters={"a": 1}) == "m"


async def test_adapter_choice_failure_says_why_the_base_failed(pod: RunningPod) -> None:
    pod.runtime.switches.fail["/base"] = "weights are truncated"
    status, answer, _ = await pod.chat("sql")
    assert status == 424
    for words in ("its base base__", "weights are truncated"):
        assert words in answer["error"]["message"]


async def test_adapter_is_loaded_as_soon_as_its_base_is_registered_again(pod: RunningPod) -> None:
    async with pod.http.delete("/admin/v1/models/base") as removal:
        assert removal.status == 204
    for _ in range(2):
        status, answer, _ = await pod.chat("sql")
        assert status == 424
        assert "its base 'base' is not registered; register 'base'" in answer["error"]["message"]
    await pod.name("base", "/base")
    assert (await called(pod, "sql")).startswith("sql__")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"adapter_id": 5}, "adapter_id"), ({"adapter_id": "nobody"}, "adapter_id"), ({"stream": 5}, "stream")],
)
async def test_refused_fields_are_named(pod: RunningPod, fields: dict[str, Any], param: str) -> None:
    status, answer, _ = await pod.chat("base", **fields)
    assert (status, answer["error"]["param"]) == (400, param)


async def test_load_lora_adapter_names_the_fields_that_it_ignores(pod: RunningPod) -> None:
    body = {"lora_name": "poems", "lora_path": "/adapters/poems", "base_model_name": "base"}
    warnings = []
    for fields in ({}, {"load_inplace": True, 'is "3d"': True}):
        async with pod.http.post("/v1/load_lora_adapter", json={**body, **fields}) as answer:
            assert answer.status == 200, await answer.text()
            warnings.append(answer.headers.get("Warning"))
    assert warnings == [None, '299 repertory "unknown fields were ignored: is??3d?"']
