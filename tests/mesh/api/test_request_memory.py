"""The memory of held requests is bounded over both ports, and bursts are refused with a hint."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.request_memory import RequestMemory
from mesh.errors import Overloaded
from tests.support.pods import running_pod
from tests.support.waiting import until
from wire.fmaas import generation_pb2

KIB = 1024
FOR_M = (("mm-model-id", "m"),)


@given(st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=8), st.integers(0, 200))
def test_request_memory_never_exceeds_its_limit(requests: list[list[int]], limit_bytes: int) -> None:
    memory = RequestMemory(limit_bytes)
    held = []
    for sizes in requests:
        account = memory.hold()
        held.append(account)
        for size in sizes:
            before = memory.used_bytes
            try:
                account.add(size)
            except Overloaded:
                assert before + size > limit_bytes
                assert memory.used_bytes == before
            assert memory.used_bytes <= limit_bytes
    for account in held:
        account.close()
        account.close()
    assert memory.used_bytes == 0


async def test_bodies_that_wait_for_a_model_share_one_budget(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", request_memory_bytes=300 * KIB) as pod:
        model_id = (await pod.name("m", "/files"))["model_id"]
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        padding = "x" * 100 * KIB
        texts = [generation_pb2.GenerationRequest(text=padding)]
        message = generation_pb2.BatchedGenerationRequest(model_id=model_id, requests=texts).SerializeToString()
        held = [asyncio.ensure_future(pod.chat("m", prompt=padding)) for _ in range(2)]
        await until(lambda: pod.pod.copies.num_waiting(model_id) == 2)
        status, body, headers = await pod.chat("m", prompt=padding)
        assert status == 429
        assert "request_memory_bytes" in body["error"]["message"]
        assert int(headers["Retry-After"]) >= 1
        with pytest.raises(grpc.aio.AioRpcError, match="request_memory_bytes") as caught:
            await pod.unary("/fmaas.GenerationService/Generate")(message)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        async def chunked() -> Any:
            for _ in range(30):
                yield b" " * 10 * KIB

        async with pod.http.post("/v1/completions", data=chunked()) as answer:
            assert answer.status == 429
        gate.set()
        assert [answer[0] for answer in await asyncio.gather(*held)] == [200, 200]
        # what has been answered is held no longer
        assert (await pod.chat("m", prompt=padding))[0] == 200
        assert await pod.unary("/fmaas.GenerationService/Generate")(message) == message


async def test_request_memory_refuses_a_burst_of_calls_without_cancelling_others(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", max_held=50) as pod:
        await pod.register("m")
        gate = pod.runtime.switches.load_gate = asyncio.Event()
        codes: Counter[str] = Counter()

        async def call() -> None:
            try:
                await pod.unary("/test.Any/Echo")(b"hi", metadata=FOR_M, timeout=60)
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[error.code().name] += 1

        calls = [asyncio.ensure_future(call()) for _ in range(4000)]
        await until(lambda: codes["RESOURCE_EXHAUSTED"] == 3950, 60)
        gate.set()
        await asyncio.gather(*calls)
        assert codes == {"OK": 50, "RESOURCE_EXHAUSTED": 3950}
