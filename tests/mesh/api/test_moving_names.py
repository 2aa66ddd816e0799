"""A name that moves to other files under load: no request fails."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import grpc
import pytest

from mesh.errors import NotFound
from mesh.routing.router import CopyRouter
from mesh.types import Target
from tests.support.etcd import EtcdServer
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until


@pytest.fixture(params=["one pod", "two pods"])
async def pods(request: pytest.FixtureRequest, tmp_path: Path, etcd: EtcdServer) -> AsyncIterator[list[RunningPod]]:
    names = ("a",) if request.param == "one pod" else ("a", "b")
    store = f"{etcd.url}/{uuid.uuid4().hex}"
    async with AsyncExitStack() as stack:
        pods = [
            await stack.enter_async_context(running_pod(tmp_path / name, store=store, switches=Switches(chunk_s=0.005)))
            for name in names
        ]
        await until(lambda: all(len(pod.pod.registry.instances.live()) == len(pods) for pod in pods))
        yield pods


async def test_moving_name_fails_no_request(pods: list[RunningPod]) -> None:
    await pods[0].name("org/smol", "/files-0")
    assert (await pods[0].chat("org/smol"))[0] == 200
    await until(lambda: all("org/smol" in pod.pod.registry.names() for pod in pods))
    stop = asyncio.Event()
    answers: set[str] = set()
    wrong: list[object] = []

    async def ask_http(pod: RunningPod) -> None:
        while not stop.is_set():
            status, body, _ = await pod.chat("org/smol")
            if status != 200:
                wrong.append(body)
            else:
                answers.add(body["answer"])

    async def stream_http(pod: RunningPod) -> None:
        while not stop.is_set():
            async with pod.http.post("/v1/chat/completions", json={"model": "org/smol", "stream": True}) as answer:
                text = await answer.text()
            if answer.status != 200 or not text.endswith("data: [DONE]\n\n"):
                wrong.append((answer.status, text))

    async def ask_grpc(pod: RunningPod) -> None:
        while not stop.is_set():
            try:
                assert await pod.echo("org/smol") == b"hi"
            except grpc.aio.AioRpcError as error:
                wrong.append((error.code(), error.details()))

    def has_answered(number: int) -> bool:
        return len(answers) > number or bool(wrong)

    asking = [asyncio.create_task(ask(pod)) for pod in pods for ask in (ask_http, stream_http, ask_grpc, ask_http)]
    versions = 8
    for number in range(1, versions):
        await pods[number % len(pods)].name("org/smol", f"/files-{number}")
        await until(partial(has_answered, number))
    stop.set()
    await asyncio.gather(*asking)
    assert wrong == []
    assert len(answers) == versions
    await until(lambda: all(len(pod.runtime.loaded) <= 1 for pod in pods))


async def test_attempts_follow_a_name_that_moves_before_routing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name's new model is not loaded yet: the request waits for it instead of failing with NOT_FOUND."""
    async with running_pod(tmp_path / "pod") as pod:
        route = CopyRouter.route
        moves: list[str] = []

        async def late_route(self: CopyRouter, model_id: str, **options: object) -> Target:
            # the name moves after it was resolved; nothing is loaded, so it moves at once
            if moves:
                await pod.name("m", moves.pop(0))
            return await route(self, model_id, **options)  # type: ignore[arg-type]

        await pod.name("m", "/first")
        monkeypatch.setattr(CopyRouter, "route", late_route)
        moves.extend(["/second", "/third"])
        status, body, _ = await pod.chat("m")
        assert (status, body["error"]["code"]) == (404, "model_not_found"), (
            "a name that moves again and again is not followed for ever"
        )
        moves.append("/fourth")
        assert await pod.echo("m") == b"hi"
        await pod.pod.placement.unload((await pod.model("m"))["model_id"])
        moves.append("/fifth")
        assert (await pod.chat("m"))[0] == 200
        assert list(pod.runtime.loaded.values()) == ["/fifth"]


async def test_successor_is_none_without_a_replacement(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod") as pod:
        registry = pod.pod.registry
        model_id = (await pod.name("m", "/first"))["model_id"]
        assert await registry.successor("m", model_id) is None
        assert await registry.successor("m", "another") == model_id
        await registry.remove_name("m")
        assert await registry.successor("m", model_id) is None
        with pytest.raises(NotFound):
            registry.resolve("m")
