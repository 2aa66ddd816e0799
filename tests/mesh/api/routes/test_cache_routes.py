"""The disk caches of two pods, listed and dropped through either of them."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.etcd import EtcdServer
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until
from wire.repertory import runtime_pb2 as state_pb

KEYS = ("team-key",)
HEADERS = {"Authorization": "Bearer team-key"}
MIB = 1 << 20


@pytest.fixture
async def pods(tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[tuple[RunningPod, RunningPod]]:
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with (
        running_pod(tmp_path / "a", store=store, api_keys=KEYS) as a,
        running_pod(tmp_path / "b", store=store, api_keys=KEYS) as b,
    ):
        await until(lambda: all(len(pod.pod.registry.instances.live()) == 2 for pod in (a, b)))
        a.runtime.files = [cached("shared", in_use=True), cached("only-a")]
        b.runtime.files = [cached("shared"), cached("only-b")]
        yield a, b


def cached(key: str, *, in_use: bool = False) -> state_pb.CachedFiles:
    return state_pb.CachedFiles(key=key, kind="pulled", uri=f"/{key}", size_bytes=MIB, in_use=in_use)


async def call(pod: RunningPod, method: str, path: str, body: Any = None) -> dict[str, Any]:
    async with pod.http.request(method, path, json=body, headers=HEADERS) as answer:
        assert answer.status == 200
        found: dict[str, Any] = await answer.json()
        return found


async def test_cache_lists_the_files_of_all_pods(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    expected = {
        (a.pod.instance_id, "shared"),
        (a.pod.instance_id, "only-a"),
        (b.pod.instance_id, "shared"),
        (b.pod.instance_id, "only-b"),
    }
    for pod in pods:
        listing = await call(pod, "GET", "/admin/v1/cache")
        assert {(entry["pod"], entry["key"]) for entry in listing["entries"]} == expected
        assert [each["used_bytes"] for each in listing["pods"]] == [2 * MIB, 2 * MIB]
        assert listing["budget_bytes"] == 2 << 30


async def test_cache_drops_a_key_on_every_pod_that_does_not_use_it(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    dropped = await call(a, "POST", "/admin/v1/cache/drop", {"keys": ["shared", "only-b"]})
    assert (dropped["freed_bytes"], dropped["num_in_use"], dropped["failed"]) == (2 * MIB, 1, [])
    assert [file.key for file in a.runtime.files] == ["shared", "only-a"]
    assert b.runtime.files == []


async def test_cache_names_the_pod_that_does_not_answer(pods: tuple[RunningPod, RunningPod]) -> None:
    a, b = pods
    await b.pod.http.stop()
    listing, dropped = await asyncio.gather(
        call(a, "GET", "/admin/v1/cache"), call(a, "POST", "/admin/v1/cache/drop", {"keys": ["only-a"]})
    )
    assert {entry["pod"] for entry in listing["entries"]} == {a.pod.instance_id}
    (silent,) = (pod for pod in listing["pods"] if pod["error"])
    assert silent["instance_id"] == b.pod.instance_id
    assert "does not answer" in silent["error"]
    assert dropped["freed_bytes"] == MIB
    assert [pod["instance_id"] for pod in dropped["failed"]] == [b.pod.instance_id]
