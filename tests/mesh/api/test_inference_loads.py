"""gRPC calls of models that are not loaded: one load for all who wait, its failures, and the limits of waiting."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio

from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, code_of, running_pod
from tests.support.waiting import until

FOR_M = (("mm-model-id", "m"),)


async def test_inference_waiters_survive_an_unload_during_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    waiting = asyncio.ensure_future(pod.echo("m", timeout=10))
    await until(lambda: pod.runtime.loading)
    dropping = asyncio.ensure_future(pod.pod.placement.unload("m"))
    await until(lambda: pod.runtime.log.count(("load", "m")) == 2)
    gate.set()
    await dropping
    assert await waiting == b"hi"


async def test_inference_lost_model_is_reloaded_unseen(either: RunningPod) -> None:
    await either.echo("m")
    either.runtime.drop("m")
    assert await either.echo("m", b"again") == b"again"
    assert either.runtime.log.count(("load", "m")) == 2


async def test_inference_refused_request_waits_for_a_newer_snapshot(pod: RunningPod) -> None:
    await pod.echo("m")
    pod.runtime.switches.engine_ready = False  # without a report
    generate = pod.unary("/fmaas.GenerationService/Generate")
    calls = [asyncio.ensure_future(generate(b"hi", metadata=FOR_M)) for _ in range(20)]
    await until(lambda: pod.pod.copies.num_waiting("m") == 20)
    assert not pod.pod.monitor.is_serving
    pod.runtime.switches.engine_ready = True
    pod.runtime.tell()
    assert await asyncio.gather(*calls) == [b"hi"] * 20
    assert 0 < pod.runtime.refusals <= 20  # requests after the new report were not refused at all


async def test_inference_hundred_requests_start_one_load(pod: RunningPod) -> None:
    pod.runtime.switches.load_gate = asyncio.Event()
    calls = [asyncio.ensure_future(pod.echo("m", str(index).encode())) for index in range(100)]
    await until(lambda: pod.pod.copies.num_waiting("m") == 100)
    pod.runtime.switches.load_gate.set()
    assert await asyncio.gather(*calls) == [str(index).encode() for index in range(100)]
    assert pod.runtime.log.count(("load", "m")) == 1
    assert pod.pod.copies.in_flight("m") == 0


async def test_inference_cancelled_waiter_does_not_stop_the_load(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    call = pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M)
    await until(lambda: "m" in pod.runtime.loading)
    call.cancel()
    await until(lambda: pod.pod.copies.num_waiting("m") == 0)
    gate.set()
    await until(lambda: "m" in pod.runtime.loaded)


async def test_inference_load_failure_has_its_cause_and_is_not_repeated_at_once(pod: RunningPod) -> None:
    pod.runtime.switches.fail["/m"] = "no tensors in it"
    for _ in range(2):
        code, details = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M))
        assert code is grpc.StatusCode.INTERNAL
        assert details.startswith("FAILED_PRECONDITION: no tensors in it")
    assert pod.runtime.log.count(("load", "m")) == 1
    assert pod.runtime.log.count(("unload", "m")) == 1
    pod.runtime.switches.fail.clear()
    await until(lambda: not pod.pod.states.blocked_for_s("m"))
    assert await pod.echo("m") == b"hi"


async def test_router_wait_budget_ends_in_unavailable_with_retry_hint(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", wait_budget_s=0.2) as pod:
        await pod.register("m")
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        call = pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M)
        code, details = await code_of(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "wait budget of 0.2 s" in details
        assert 1 <= int(str(dict(tuple(await call.trailing_metadata()))["retry-after"])) <= 120
        gate.set()
        await until(lambda: "m" in pod.runtime.loaded)


async def test_router_deadline_shorter_than_the_load(pod: RunningPod) -> None:
    pod.runtime.switches.load_gate = asyncio.Event()
    code, _ = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M, timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    pod.runtime.switches.load_gate.set()


async def test_router_refuses_more_waiters_than_allowed(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", max_held=2) as pod:
        await pod.register("m")
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        waiting = [asyncio.ensure_future(pod.echo("m")) for _ in range(2)]
        await until(lambda: pod.pod.copies.num_waiting("m") == 2)
        code, details = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the limit is 2" in details
        gate.set()
        await asyncio.gather(*waiting)


async def test_inference_evicts_least_used_at_capacity(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=25 * MB)) as pod:
        for name in ("a", "b", "c"):
            await pod.register(name)
        await pod.echo("a")
        await pod.echo("b")
        await pod.echo("a")
        await pod.echo("c")
        assert set(pod.runtime.loaded) == {"a", "c"}
        await pod.echo("b")
        # both a and c are idle, and a was used twice
        assert set(pod.runtime.loaded) == {"a", "b"}
