"""Writes that go on while their task does something else."""

import asyncio
import gc

import pytest

from mesh.api.started_write import StartedWrite
from tests.support.waiting import until


async def test_started_write_begins_at_once_and_ends_when_awaited() -> None:
    steps: list[str] = []
    transport = asyncio.get_running_loop().create_future()

    async def write() -> None:
        steps.append("begun")
        await transport
        steps.append("ended")

    writing = StartedWrite(write())
    assert steps == ["begun"]
    asyncio.get_running_loop().call_soon(transport.set_result, None)
    await writing
    await writing
    assert steps == ["begun", "ended"]


async def test_started_write_goes_on_after_several_waits() -> None:
    waits = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def write() -> None:
        for wait in waits:
            await wait

    writing = StartedWrite(write())
    waits[0].set_result(None)  # before it is awaited
    task = asyncio.create_task(_finish(writing))
    for wait in waits[1:]:
        await asyncio.sleep(0)
        assert not task.done()
        wait.set_result(None)
    await task


async def test_started_write_without_a_wait_has_ended() -> None:
    async def write() -> None:
        pass

    await StartedWrite(write())


async def test_started_write_raises_its_error_once() -> None:
    transport = asyncio.get_running_loop().create_future()

    async def write() -> None:
        await transport

    writing = StartedWrite(write())
    transport.set_exception(ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        await writing
    await writing


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_started_write_is_abandoned_with_its_task(is_awaited: bool) -> None:
    transport = asyncio.get_running_loop().create_future()
    steps: list[str] = []

    async def write() -> None:
        steps.append("begun")
        try:
            await transport
        finally:
            steps.append("abandoned")

    async def serve() -> None:
        writing = StartedWrite(write())
        try:
            if is_awaited:
                await writing
            await asyncio.Event().wait()
        finally:
            writing.close()

    task = asyncio.create_task(serve())
    await until(lambda: steps == ["begun"])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["begun", "abandoned"]


@pytest.mark.parametrize("fails_first", [True, False])
async def test_started_write_that_is_abandoned_leaves_no_error_behind(fails_first: bool) -> None:
    loop = asyncio.get_running_loop()
    reported: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))

    async def write(wait: "asyncio.Future[None]") -> None:
        await wait

    def abandon() -> None:
        transport: asyncio.Future[None] = loop.create_future()
        writing = StartedWrite(write(transport))
        if fails_first:
            transport.set_exception(ConnectionError("gone"))
        writing.close()
        if not transport.done():  # gRPC reports to every future that is not cancelled
            transport.set_exception(ConnectionError("gone"))

    abandon()
    gc.collect()
    assert not reported


async def _finish(writing: StartedWrite) -> None:
    await writing
