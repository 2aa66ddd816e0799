"""When models are evicted for a load: as late as its runtime allows, and never for a load that fails before."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.placement.deferred_room import seconds_until_room
from tests.support.fake_runtime import MB, Switches
from tests.support.pods import RunningPod, running_pod
from tests.support.waiting import until

SECONDS = st.floats(0.0, 600.0)


@given(SECONDS, SECONDS, SECONDS, SECONDS, st.booleans())
def test_seconds_until_room_only_shrink_and_leave_time_for_the_unload(
    expected_s: float, elapsed_s: float, later_s: float, unload_s: float, is_prepared: bool
) -> None:
    left_s = seconds_until_room(expected_s, elapsed_s, unload_s, is_prepared=is_prepared)
    assert 0.0 <= left_s <= max(0.0, expected_s - unload_s - elapsed_s)
    assert seconds_until_room(expected_s, elapsed_s + later_s, unload_s, is_prepared=is_prepared) <= left_s
    assert seconds_until_room(expected_s, elapsed_s, unload_s, is_prepared=True) == 0.0


@given(st.floats(1.0, 600.0))
def test_seconds_until_room_leave_the_victim_most_of_the_preparation(expected_s: float) -> None:
    assert 0.89 * expected_s <= seconds_until_room(expected_s, 0.0, 0.01, is_prepared=False) <= 0.91 * expected_s


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[RunningPod]:
    """A pod with room for one model, `a`, which it has loaded in a second. The load of `b` will be expected to take as long."""
    async with running_pod(tmp_path / "pod", switches=Switches(capacity_bytes=15 * MB, load_s=1.0)) as pod:
        for name in ("a", "b"):
            await pod.register(name, f"/{name}")
        await pod.echo("a")
        yield pod


async def test_deferred_room_leaves_the_victim_loaded_while_files_are_fetched(pod: RunningPod) -> None:
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    waiting = asyncio.create_task(pod.echo("b"))
    await until(lambda: "b" in pod.runtime.loading)
    assert await pod.echo("a") == b"hi"
    assert set(pod.runtime.loaded) == {"a"}
    gate.set()
    assert await waiting == b"hi"
    assert set(pod.runtime.loaded) == {"b"}
    assert pod.runtime.log.count(("load", "a")) == 1
    assert pod.pod.copies.usage().used_bytes == 10 * MB


async def test_deferred_room_is_not_made_for_a_load_that_fails_before(pod: RunningPod) -> None:
    pod.runtime.switches.load_s = 0.1
    pod.runtime.switches.fail = {"/b": "no such repository"}
    with pytest.raises(grpc.aio.AioRpcError, match="no such repository"):
        await pod.echo("b")
    assert ("unload", "a") not in pod.runtime.log
    assert await pod.echo("a") == b"hi"


async def test_deferred_room_is_made_when_the_runtime_reads_the_weights(pod: RunningPod) -> None:
    pod.runtime.switches.is_reading = True
    gate = pod.runtime.switches.load_gate = asyncio.Event()
    begun_s = time.monotonic()
    waiting = asyncio.create_task(pod.echo("b"))
    await until(lambda: not pod.runtime.loaded)
    assert time.monotonic() - begun_s < 0.8, "it did not wait for the expected end of the load"
    gate.set()
    assert await waiting == b"hi"


async def test_deferred_room_is_made_when_the_runtime_refuses_because_of_space(pod: RunningPod) -> None:
    pod.runtime.switches.load_s = 0.0
    begun_s = time.monotonic()
    assert await pod.echo("b") == b"hi"
    assert time.monotonic() - begun_s < 0.8, "it did not wait for the expected end of the load"
    assert set(pod.runtime.loaded) == {"b"}


async def test_deferred_room_is_made_for_a_load_that_the_runtime_ended_without_it(pod: RunningPod) -> None:
    """Our runtime keeps weights beyond its capacity out of device memory instead of refusing them. The mesh keeps to the capacity."""
    pod.runtime.switches.overcommits, pod.runtime.switches.load_s = True, 0.0
    assert await pod.echo("b") == b"hi"
    assert set(pod.runtime.loaded) == {"b"}
    assert pod.pod.copies.usage().used_bytes == 10 * MB


async def test_deferred_room_that_cannot_be_made_leaves_nothing_in_the_runtime(pod: RunningPod) -> None:
    pod.runtime.switches.overcommits, pod.runtime.switches.load_s = True, 0.0
    pod.runtime.switches.answer_s = 30.0
    busy = asyncio.create_task(pod.echo("a"))
    await until(lambda: pod.runtime.computing)
    waiting = asyncio.create_task(pod.echo("b"))
    await until(lambda: "b" in pod.runtime.loaded)
    async with pod.http.delete("/admin/v1/models/b") as answer:
        assert answer.status == 204
    await until(lambda: set(pod.runtime.loaded) == {"a"})
    with pytest.raises(grpc.aio.AioRpcError):
        await waiting
    busy.cancel()


async def test_deferred_room_is_made_before_a_foreign_runtime_loads(tmp_path: Path) -> None:
    switches = Switches(capacity_bytes=15 * MB)
    async with running_pod(tmp_path / "pod", switches=switches, foreign=True) as pod:
        for name in ("a", "b"):
            await pod.register(name, f"/{name}")
            await pod.echo(name)
        assert [entry for entry in pod.runtime.log if entry[0] != "purge"] == [
            ("load", "a"),
            ("unload", "a"),
            ("load", "b"),
        ]
