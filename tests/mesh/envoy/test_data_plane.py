"""A pod behind a real Envoy, or with workers, over a fake runtime: which calls they carry, and what happens as models come and go."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.support.envoy import (
    ENVOY,
    WORKERS,
    num_through_mesh,
    running_envoy_pod,
    running_in,
    until_carried,
    until_listed,
)
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod
from tests.support.waiting import until

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture(params=(ENVOY, WORKERS))
async def pod(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RunningPod]:
    switches = Switches(capacity_bytes=20 * MB)
    async with running_in(request.param, tmp_path / "pod", switches=switches, grace_s=30.0) as running:
        await running.register("m")
        await running.load("m")
        await until_carried(running, "m")
        yield running


@pytest.mark.parametrize("pod", [ENVOY], indirect=True)
async def test_envoy_carries_calls_of_a_loaded_model(pod: RunningPod) -> None:
    before = await num_through_mesh(pod, "m")
    metadata = (*FOR_M, ("authorization", "Bearer secret"), ("x-repertory-caller", "admin"))
    assert await pod.unary("/test.Any/Echo")(b"hi", metadata=metadata) == b"hi"
    seen = dict(pod.runtime.metadata[-1])
    assert (seen["mm-model-id"], seen["mm-model-id-bin"]) == ("m", b"m")
    headers = {
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "x-repertory-name": "forged",
        "X-Request-Id": "r1",
    }
    async with pod.http.post("/v1/completions", json={"model": "m"}, headers=headers) as answer:
        assert (await answer.json())["answer"] == "m"
        assert answer.headers["X-Request-Id"] == "r1"
    sent = {name.lower() for name in pod.runtime.headers[-1]}
    for names in (set(seen), sent):
        assert not names & {"authorization", "x-api-key", "x-repertory-caller", "x-repertory-name"}
    assert "x-repertory-model" not in sent, "the body names the model"
    assert await num_through_mesh(pod, "m") == before


@pytest.mark.parametrize("pod", [ENVOY], indirect=True)
@pytest.mark.parametrize("is_listed", [False, True])
async def test_envoy_leaves_unusual_calls_to_the_mesh(pod: RunningPod, *, is_listed: bool) -> None:
    if is_listed:
        await until_listed(pod, "m")
    echo = pod.unary("/test.Any/Echo")
    for extra in (("mm-model-id", "other"), ("mm-vmodel-id", "m"), ("mm-required", "all")):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await echo(b"hi", metadata=(("mm-model-id", "none"), extra))
        assert refused.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT), extra
    for extra in (("mm-model-id-bin", "m"), ("repertory-peer-key", "guessed")):
        before = await num_through_mesh(pod, "m")
        await echo(b"hi", metadata=(*FOR_M, (extra[0], extra[1].encode() if "bin" in extra[0] else extra[1])))
        assert await num_through_mesh(pod, "m") == before + 1, extra
        assert "repertory-peer-key" not in dict(pod.runtime.metadata[-1])
    for method in ("/mmesh.ModelRuntime/unloadModel", "/repertory.RuntimeState/watch"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pod.unary(method)(b"", metadata=FOR_M)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "m" in pod.runtime.loaded


@pytest.mark.parametrize("is_listed", [False, True])
async def test_pages_of_other_sites_are_refused(pod: RunningPod, *, is_listed: bool) -> None:
    if is_listed:
        await until_listed(pod, "m")
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        async with pod.http.post("/v1/completions", json={"model": "m"}, headers=headers) as answer:
            assert answer.status == 403, headers


async def test_call_for_a_model_that_the_runtime_lost_goes_to_the_mesh(pod: RunningPod) -> None:
    del pod.runtime.loaded["m"]
    assert await pod.echo("m", b"x" * 100_000) == b"x" * 100_000
    assert pod.runtime.log.count(("load", "m")) == 2
    del pod.runtime.loaded["m"]
    assert (await pod.chat("m"))[0] == 200


async def test_call_that_the_runtime_refuses_now_goes_to_the_mesh(pod: RunningPod) -> None:
    pod.runtime.switches.unavailable = 1
    assert await pod.echo("m") == b"hi"
    pod.runtime.switches.unavailable = 1
    assert (await pod.chat("m"))[0] == 200
    assert pod.runtime.refusals == 2


async def test_names_of_the_table_follow_their_models(pod: RunningPod) -> None:
    odd = "%20a.b|c+(d)/e"
    await pod.register(odd)
    await until_carried(pod, odd)
    await until_listed(pod, odd, "m")
    before = await num_through_mesh(pod, odd)
    assert await pod.echo(odd) == b"hi"
    assert (await pod.chat(odd))[1]["answer"] == odd
    assert await num_through_mesh(pod, odd) == before
    del pod.runtime.loaded[odd]
    assert await pod.echo(odd) == b"hi", "the mesh knows the name of a call that the runtime has refused"
    for name in ("a.b", "axb|c+(d)/e", "mm"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pod.echo(name)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    await pod.pod.placement.unload("m")
    assert await pod.echo("m") == b"hi"
    assert pod.runtime.log[-2:] == [("unload", "m"), ("load", "m")]


async def test_carried_calls_count_as_use(pod: RunningPod) -> None:
    copy = pod.pod.copies.get("m")
    assert copy is not None
    used_ms, use = copy.last_used_ms, pod.pod.copies.uses.of("m")
    call = pod.server_stream("/test.Any/Slow")(b"go", metadata=FOR_M)
    assert await call.read() == b"first"
    await until(lambda: pod.pod.copies.in_flight("m") == 1)
    assert copy.last_used_ms > used_ms
    assert pod.pod.copies.uses.of("m") > use
    async with pod.http.get("/metrics") as answer:
        text = await answer.text()
    assert 'repertory_mesh_carried_requests_total{carrier="grpc",model_name="m"}' in text
    call.cancel()
    await until(lambda: pod.pod.copies.in_flight("m") == 0)


async def test_unload_waits_for_carried_calls(pod: RunningPod) -> None:
    call = pod.method("Echo")(metadata=FOR_M)
    await call.write(b"1")
    assert await call.read() == b"1"
    unloading = asyncio.ensure_future(pod.pod.placement.unload("m"))
    # Calls that leave before the names are withdrawn are carried as before; then they wait for the next load.
    later = asyncio.ensure_future(pod.echo("m"))
    async with asyncio.timeout(20):
        while not pod.pod.copies.num_waiting("m"):
            if later.done():
                later = asyncio.ensure_future(pod.echo("m"))
            await asyncio.sleep(0.01)
    await call.write(b"2")
    assert await call.read() == b"2"
    assert pod.runtime.log[-1] == ("load", "m"), "the model is not unloaded while it answers"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    await unloading
    assert await later == b"hi"
    assert pod.runtime.log[-2:] == [("unload", "m"), ("load", "m")]


async def test_no_call_fails_while_models_come_and_go(pod: RunningPod) -> None:
    """Room for two of three models, all of which are called: each call may evict a model whose calls are carried."""
    for name in ("n", "o"):
        await pod.register(name)
    outcomes: Counter[str] = Counter()

    async def call(number: int) -> None:
        name = ("m", "n", "o")[number % 3]
        try:
            outcomes[(await pod.echo(name, timeout=30)).decode()] += 1
            outcomes[str((await pod.chat(name))[0])] += 1
        except grpc.aio.AioRpcError as error:
            outcomes[f"{error.code().name}: {error.details()}"] += 1

    async def caller(first: int) -> None:
        for number in range(first, first + 40):
            await call(number // 10)

    await asyncio.gather(*(caller(first) for first in range(0, 80, 10)))
    assert outcomes == {"hi": 320, "200": 320}
    assert Counter(pod.runtime.log)["unload", "m"] + Counter(pod.runtime.log)["unload", "n"] > 1


async def test_calls_that_select_an_adapter_are_the_meshs(pod: RunningPod) -> None:
    before = await num_through_mesh(pod, "m")
    for fields in ({"adapter_id": "none"}, {"lora_request": {"lora_name": "none", "lora_int_id": 1}}):
        async with pod.http.post("/v1/completions", json={"model": "m", **fields}) as answer:
            assert answer.status == 400
            assert "not registered" in await answer.text()
    await pod.name("tuned", "/adapter", adapter_of="m")
    await until(lambda: pod.pod.registry.names() == ["m", "tuned"])
    async with asyncio.timeout(10):
        while await num_through_mesh(pod, "m") == before:
            await pod.echo("m")
    assert (await pod.chat("m"))[0] == 200


async def test_calls_beyond_a_copys_limit_wait_in_the_mesh(tmp_path: Path) -> None:
    async with running_envoy_pod(tmp_path / "pod", switches=Switches(max_concurrency=2)) as pod:
        await pod.register("m")
        await until_carried(pod, "m")
        held = [pod.method("Echo")(metadata=FOR_M) for _ in range(2)]
        for call in held:
            await call.write(b"1")
            assert await call.read() == b"1"
        before = await num_through_mesh(pod, "m")
        assert await pod.echo("m") == b"hi"
        assert await num_through_mesh(pod, "m") == before + 1
        for call in held:
            call.cancel()


async def test_messages_that_need_an_id_written_into_them_are_the_meshs(tmp_path: Path) -> None:
    switches = Switches(methods={"test.Any/Echo": (1,)})
    async with running_envoy_pod(tmp_path / "pod", switches=switches, foreign=True) as pod:
        await pod.register("m")
        await pod.load("m")
        async with asyncio.timeout(10):
            while not (await _chat_passes(pod)):
                pass
        before = await num_through_mesh(pod, "m")
        assert await pod.echo("m", b"\n\x01x") == b"\n\x01m"
        assert await num_through_mesh(pod, "m") == before + 1


async def _chat_passes(pod: RunningPod) -> bool:
    before = await num_through_mesh(pod, "m")
    await pod.chat("m")
    return await num_through_mesh(pod, "m") == before


async def test_moved_name_is_carried_to_its_new_model(pod: RunningPod) -> None:
    first = (await pod.name("smol", "/one"))["model_id"]
    await until_carried(pod, "smol")
    await pod.name("smol", "/two")
    answers = [first]
    async with asyncio.timeout(10):
        while answers[-1] == first:
            status, body, _ = await pod.chat("smol")
            assert status == 200
            answers.append(body["answer"])
    await until_carried(pod, "smol")
    assert (await pod.chat("smol"))[1]["answer"] == answers[-1], "the name does not move back"
    assert answers[-1].startswith("smol__")
