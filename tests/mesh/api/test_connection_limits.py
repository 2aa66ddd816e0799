"""Slow, silent and too many connections to a pod are closed, and busy ones are not."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import uvloop

from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until, until_async

LIMITS: dict[str, Any] = {
    "http_header_timeout_s": 0.4,
    "http_body_timeout_s": 0.6,
    "http_idle_timeout_s": 0.5,
    "http_write_timeout_s": 0.5,
    "max_connections": 4,
}
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    async with running_pod(tmp_path / "pod", **LIMITS) as running:
        await running.register("m")
        await running.load("m")
        yield running


@asynccontextmanager
async def connected(pod: RunningPod) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", pod.pod.http.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def closed_after_s(reader: asyncio.StreamReader) -> float:
    """Return how long the connection stays open. What arrives is dropped."""
    begun_s = time.monotonic()
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
    return time.monotonic() - begun_s


async def drip(writer: asyncio.StreamWriter, text: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for byte in text * 1000:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)


def test_limits_work_on_the_event_loop_of_a_real_pod(tmp_path: Path) -> None:
    """A pod runs on uvloop, whose transports are of other classes than asyncio's."""

    async def use() -> None:
        async with running_pod(tmp_path / "pod", **LIMITS) as pod, connected(pod) as (reader, writer):
            writer.write(GET)
            assert (await reader.readline()).endswith(b"200 OK\r\n")
            assert await closed_after_s(reader) < 5

    uvloop.run(use())


async def test_connection_without_a_request_is_closed(pod: RunningPod) -> None:
    async with connected(pod) as (reader, _):
        assert await closed_after_s(reader) < 5


@pytest.mark.parametrize("first", [b"", GET], ids=["first request", "next request"])
async def test_connection_with_slow_headers_is_closed(pod: RunningPod, first: bytes) -> None:
    async with connected(pod) as (reader, writer):
        if first:
            writer.write(first)
            assert (await reader.readline()).endswith(b"200 OK\r\n")
        dripping = asyncio.create_task(drip(writer, b"GET /health HTTP/1.1\r\nX-Slow: xxxxxxxxxxxxxxxxxxx"))
        assert await closed_after_s(reader) < 5
        dripping.cancel()


async def test_slow_body_is_refused(pod: RunningPod) -> None:
    async with connected(pod) as (reader, writer):
        writer.write(HEAD + b"Content-Length: 1000\r\n\r\n")
        dripping = asyncio.create_task(drip(writer, b"x"))
        async with asyncio.timeout(5):
            assert b" 504 " in await reader.readline()
        dripping.cancel()


async def test_idle_connection_is_closed_and_a_busy_one_is_not(pod: RunningPod) -> None:
    async with connected(pod) as (reader, writer):
        for _ in range(8):
            writer.write(GET)
            async with asyncio.timeout(5):
                assert (await reader.readline()).endswith(b"200 OK\r\n")
                while await reader.readline() != b"\r\n":
                    pass
                await reader.readexactly(16)
            await asyncio.sleep(0.1)
        assert await closed_after_s(reader) < 5
    pod.runtime.switches.chunk_s = 0.1
    async with pod.http.post("/v1/completions", json={"model": "m", "stream": True, "chunks": 15}) as answer:
        assert (await answer.text()).endswith("data: [DONE]\n\n"), "a stream may take longer than every limit"


async def test_client_that_reads_nothing_is_disconnected(pod: RunningPod) -> None:
    pod.runtime.switches.chunk_s = 0.0
    async with connected(pod) as (_, writer):
        body = b'{"model": "m", "stream": true, "chunks": 2000000}'
        writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: pod.runtime.cancelled == ["m"], 20)


async def test_connections_over_the_limit_are_refused(pod: RunningPod) -> None:
    async with contextlib.AsyncExitStack() as stack:
        others = [await stack.enter_async_context(connected(pod)) for _ in range(4)]
        for reader, writer in others:
            writer.write(GET)
            assert (await reader.readline()).endswith(b"200 OK\r\n")
        async with connected(pod) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                writer.write(GET)
                assert await reader.read() == b""

    async def has_room() -> bool:
        async with connected(pod) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                writer.write(GET)
                return (await reader.readline()).endswith(b"200 OK\r\n")
        return False

    await until_async(has_room)


async def test_grpc_calls_of_a_connection_are_limited(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grpc_max_streams=2) as pod:
        await pod.register("m")
        metadata = (("mm-model-id", "m"),)
        slow = [pod.server_stream("/test.Any/Slow")(b"", metadata=metadata) for _ in range(2)]
        for call in slow:
            assert await call.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await pod.echo("m", timeout=0.5)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        slow[0].cancel()
        assert await pod.echo("m", timeout=5) == b"hi"
        slow[1].cancel()


async def test_idle_grpc_connection_is_closed(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grpc_idle_timeout_s=0.5) as pod:
        await pod.register("m")
        assert await pod.echo("m") == b"hi"
        await until(lambda: pod.channel.get_state() is not grpc.ChannelConnectivity.READY)
        assert await pod.echo("m") == b"hi"


async def test_old_grpc_connection_is_closed_between_calls(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grpc_max_connection_age_s=0.5) as pod:
        await pod.register("m")
        slow = pod.server_stream("/test.Any/Slow")(b"", metadata=(("mm-model-id", "m"),))
        assert await slow.read() == b"first"
        await until(lambda: pod.channel.get_state() is not grpc.ChannelConnectivity.READY)
        assert await pod.echo("m", timeout=5) == b"hi"
        assert not slow.done(), "its calls may end"
        slow.cancel()


async def test_large_grpc_headers_are_refused(tmp_path: Path) -> None:
    async with running_pod(tmp_path / "pod", grpc_max_header_bytes=2048) as pod:
        await pod.register("m")
        call = pod.unary("/test.Any/Echo")
        assert await call(b"hi", metadata=(("mm-model-id", "m"), ("big", "x" * 500))) == b"hi"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"hi", metadata=(("mm-model-id", "m"), ("big", "x" * 4000)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
