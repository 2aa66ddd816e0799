"""Keys behind a real Envoy: it carries what a hashed key allows by itself, and leaves every other caller to the mesh."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh.access.api_keys import digest_of
from tests.support.envoy import bearer, num_through_mesh, running_envoy_pod, until_carried, until_listed
from tests.support.pods import RunningPod
from tests.support.waiting import until_async

BY_NARROW = (("authorization", "Bearer narrow%"),)
# Every length around the ends of SHA-256's blocks of 64 bytes, of which 9 are not the text's in the last one.
SECRETS = ["k" * length for length in (1, 40, 41, 48, 50, 64, 90, 91, 92, 300)]


def key(name: str, *secrets: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "sha256": [digest_of(secret) for secret in secrets or (name,)], **fields}


@pytest.fixture(params=["script", "table"])
async def pod(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RunningPod]:
    """A pod with keys and two loaded models, whose clusters are chosen by Envoy's script, or by the routes' table."""
    file = tmp_path / "keys.json"
    keys = [
        key("all", scopes=["inference", "management", "metrics"]),
        key("many", *SECRETS),
        key("narrow%", models=["team/*", "x+*"]),
        key("exact", models=["team/a"]),
        key("manager", scopes=["management"]),
        key("one", max_concurrent=1),
        key("odd", models=["team/?"]),
    ]
    file.write_text(json.dumps({"keys": keys}))
    async with running_envoy_pod(tmp_path / "pod", api_keys_file=str(file)) as running:
        for name in ("team/a", "other"):
            async with running.http.post("/admin/v1/models", json={"name": name, "uri": "/m"}, headers=bearer("all")):
                pass
            await until_carried(running, name, "all")
        if request.param == "table":
            await until_listed(running, "team/a", "other")
        yield running


async def outcome(pod: RunningPod, model: str, secret: str) -> tuple[str, bool]:
    """Call by gRPC, and return the status and whether Envoy carried the call."""
    mesh, runtime = await num_through_mesh(pod, model, "all"), len(pod.runtime.metadata)
    metadata = (("mm-model-id", model), ("authorization", f"Bearer {secret}"))
    code = "OK"
    try:
        await pod.unary("/test.Any/Echo")(b"hi", metadata=metadata, timeout=5)
    except grpc.aio.AioRpcError as error:
        code = error.code().name
    passed = await num_through_mesh(pod, model, "all") == mesh
    return code, passed and len(pod.runtime.metadata) > runtime


async def test_envoy_carries_what_a_key_allows(pod: RunningPod) -> None:
    for secret in ("all", *SECRETS):
        assert await outcome(pod, "other", secret) == ("OK", True), secret
    assert await outcome(pod, "team/a", "narrow%") == ("OK", True)
    names = {name for metadata in pod.runtime.metadata for name, _ in metadata}
    assert not {"authorization", "x-api-key"} & names
    assert ("x-repertory-caller", "narrow%25") in tuple(pod.runtime.metadata[-1])
    async with pod.http.post("/v1/completions", json={"model": "other"}, headers={"x-api-key": SECRETS[0]}) as answer:
        assert answer.status == 200
    assert "x-repertory-waited" not in {name.lower() for name in pod.runtime.headers[-1]}
    assert SECRETS[-1] not in str(pod.runtime.headers)


async def test_carried_calls_count_for_their_key(pod: RunningPod) -> None:
    async def counts() -> dict[str, float]:
        async with pod.http.get("/metrics", headers=bearer("all")) as answer:
            lines = (await answer.text()).splitlines()
        prefix = "repertory_mesh_key_requests_total"
        return {
            line.split()[0].removeprefix(prefix): float(line.split()[1]) for line in lines if line.startswith(prefix)
        }

    for _ in range(3):
        assert await outcome(pod, "team/a", "narrow%") == ("OK", True)
    with pytest.raises(grpc.aio.AioRpcError):
        await pod.unary("/test.Any/Fail")(b"ABORTED", metadata=(("mm-model-id", "team/a"), *BY_NARROW))
    headers = bearer("narrow%")
    async with pod.http.post("/v1/completions", json={"model": "team/a"}, headers=headers) as answer:
        assert answer.status == 200
    pod.runtime.loaded.clear()  # the mesh counts the call that comes back to it
    assert (await outcome(pod, "team/a", "narrow%"))[0] == "OK"
    expected = {("grpc", "OK"): 4, ("grpc", "ABORTED"): 1, ("http", "200"): 1}
    wanted = {
        f'{{carrier="{carrier}",code="{code}",key="narrow%"}}': count for (carrier, code), count in expected.items()
    }

    async def are_counted() -> bool:
        found = {series: count for series, count in (await counts()).items() if "narrow" in series}
        return found == wanted

    await until_async(are_counted)


async def test_envoy_leaves_other_callers_to_the_mesh(pod: RunningPod) -> None:
    seen = len(pod.runtime.metadata)
    assert await outcome(pod, "other", "wrong") == ("UNAUTHENTICATED", False)
    assert await outcome(pod, "other", "") == ("UNAUTHENTICATED", False)
    assert await outcome(pod, "other", "narrow%") == ("PERMISSION_DENIED", False)
    assert await outcome(pod, "other", "manager") == ("PERMISSION_DENIED", False)
    assert len(pod.runtime.metadata) == seen
    for secret in ("one", "odd"):
        assert await outcome(pod, "team/a", secret) == ("OK", False)
    forged = (("mm-model-id", "other"), ("x-repertory-caller", "all"))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await pod.unary("/test.Any/Echo")(b"hi", metadata=forged)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    headers = {"x-repertory-caller": "all", "x-repertory-model": "other"}
    async with pod.http.post("/v1/completions", json={"model": "other"}, headers=headers) as answer:
        assert answer.status == 401


async def test_envoy_keeps_the_rights_of_a_recognised_caller(pod: RunningPod) -> None:
    for secret in ("narrow%", "exact"):
        pod.runtime.loaded.clear()
        assert (await outcome(pod, "team/a", secret))[0] == "OK", (
            "the mesh judges by the name, which is not the model's id"
        )
    async with pod.http.post("/v1/completions", json={"model": "none"}, headers={"x-api-key": "narrow%"}) as answer:
        assert answer.status == 403


async def test_envoy_refuses_a_removed_key_soon(pod: RunningPod, tmp_path: Path) -> None:
    assert await outcome(pod, "other", SECRETS[0]) == ("OK", True)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [key("all", scopes=["inference", "metrics"])]}))

    async def is_refused() -> bool:
        return (await outcome(pod, "other", SECRETS[0]))[0] == "UNAUTHENTICATED"

    await until_async(is_refused)
