"""Concurrency limit of a copy: running requests, the bounded queue and its order."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.errors import Overloaded
from mesh.routing.concurrency_limit import ConcurrencyLimit
from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until

FOR_M = (("mm-model-id", "m"),)


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", switches=Switches(max_concurrency=2, chunk_s=0.01)) as pod:
        await pod.register("m")
        await pod.load("m")
        yield pod


async def stream(pod: RunningPod, count: int) -> list[bytes]:
    call = pod.server_stream("/test.Any/Count")(str(count).encode(), metadata=FOR_M)
    return [bytes(message) async for message in call]


async def test_concurrency_limit_bounds_running_requests(pod: RunningPod) -> None:
    answers = await asyncio.gather(*(stream(pod, 3) for _ in range(12)))
    assert answers == [[b"0", b"1", b"2"]] * 12
    assert pod.runtime.most_running == 2
    assert (pod.pod.copies.in_flight("m"), pod.pod.copies.num_waiting("m")) == (0, 0)


async def test_concurrency_limit_frees_cancelled_slots_and_refuses_too_many(pod: RunningPod) -> None:
    slow: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = pod.server_stream("/test.Any/Count")
    pod.runtime.switches.chunk_s = 3600
    calls = [slow(b"3", metadata=FOR_M) for _ in range(2)]
    reading = [asyncio.ensure_future(call.read()) for call in calls]
    await until(lambda: pod.runtime.running == 2)
    calls += [slow(b"3", metadata=FOR_M) for _ in range(14)]
    reading += [asyncio.ensure_future(call.read()) for call in calls[2:]]
    await until(lambda: pod.runtime.running == 2 and pod.pod.copies.num_waiting("m") == 14)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await slow(b"3", metadata=FOR_M).read()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "limit of 2 at once" in (refused.value.details() or "")
    for call in (*calls[:1], *calls[10:]):
        call.cancel()
    await until(lambda: pod.pod.copies.num_waiting("m") == 7 and pod.runtime.running == 2)
    for call in calls:
        call.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    await until(lambda: pod.pod.copies.num_waiting("m") == 0 and pod.pod.copies.in_flight("m") == 0)
    pod.runtime.switches.chunk_s = 0
    assert await stream(pod, 1) == [b"0"]


async def test_concurrency_limit_wait_keeps_to_the_deadline(pod: RunningPod) -> None:
    pod.runtime.switches.chunk_s = 3600
    calls = [asyncio.ensure_future(stream(pod, 1)) for _ in range(2)]
    await until(lambda: pod.runtime.running == 2)
    late = pod.server_stream("/test.Any/Count")(b"1", metadata=FOR_M, timeout=0.3)
    with pytest.raises(grpc.aio.AioRpcError) as passed:
        await late.read()
    assert passed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: pod.pod.copies.num_waiting("m") == 0)


async def test_concurrency_limit_without_a_number_is_one(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", switches=Switches(max_concurrency=-1, chunk_s=0.01)) as pod:
        await pod.register("m")
        await pod.load("m")
        await asyncio.gather(*(stream(pod, 2) for _ in range(4)))
        assert pod.runtime.most_running == 1


@pytest.mark.parametrize(("max_in_flight", "num_admitted"), [(0, 16), (3, 3), (-1, 100)])
async def test_concurrency_limit_bounds_what_runs_and_waits(max_in_flight: int, num_admitted: int) -> None:
    limit = ConcurrencyLimit(2, max_in_flight)
    tasks = [asyncio.create_task(limit.acquire("m")) for _ in range(100)]
    await asyncio.sleep(0)
    refused = [task for task in tasks if task.done() and isinstance(task.exception(), Overloaded)]
    assert len(tasks) - len(refused) == num_admitted
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
