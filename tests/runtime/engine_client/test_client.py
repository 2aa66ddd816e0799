"""The engine client against a real process behind a real socket: streams, merging, cancelling, death and return."""

import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.config.schema import EngineConfig
from runtime.engine_client.client import EngineClient
from runtime.engine_client.lifecycle import EngineState
from runtime.engine_client.restart_policy import RestartPolicy, Silence
from runtime.engine_client.streams import DeliveryPacer, RowStream, merge_rows
from runtime.errors import EngineFault, ModelNotFound, ModelTooLarge, Overloaded, RepertoryError, Unavailable
from runtime.ipc.crash_marker import CrashMarker
from runtime.ipc.messages import Load, RowTokens
from runtime.types import Checkpoint, FinishReason, GenerationRequest, SamplingParams, StopParams
from tests.support.engines import RecordingListener, fake_command
from tests.support.fake_engine import BUDGET_BYTES, FAULT, KILL, STALL
from tests.support.waiting import until

FAST = RestartPolicy(first_s=0.01, most_s=0.05, healthy_s=60.0, start_timeout_s=20.0, max_failed_starts=3)


class Command:
    """Builds the stand-in engine's command and keeps the path of the crash marker that the client has chosen."""

    def __init__(self, journal: Path) -> None:
        self._build = fake_command(journal=journal)
        self.marker_path: Path | None = None

    def __call__(self, socket_path: Path, config: EngineConfig, marker_path: Path) -> list[str]:
        self.marker_path = marker_path
        return self._build(socket_path, config, marker_path)


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "journal")


@pytest.fixture
async def client(listener: RecordingListener, command: Command) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineConfig(), command=command, restart=FAST)
    client.listen(listener)
    client.start()
    await client.wait_ready()
    yield client
    await client.stop(0.0)


def load(model_id: str) -> Load:
    return Load(model_id, Checkpoint(model_dir="/nowhere"))


def request_of(*prompt: int, max_tokens: int) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, sampling=SamplingParams(temperature=0.0), stop=StopParams(max_tokens))


async def collect(client: EngineClient, model_id: str, prompt: Sequence[int], max_tokens: int = 4) -> list[int]:
    tokens: list[int] = []
    async for row in client.generate(model_id, request_of(*prompt, max_tokens=max_tokens)):
        tokens.extend(row.tokens)
    return tokens


def journal(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]


async def test_engine_client_loads_and_streams(client: EngineClient) -> None:
    facts = await client.load(load("a"))
    assert facts.architecture == "FakeForCausalLM"
    assert await asyncio.gather(*(collect(client, "a", [i, i + 1], 4) for i in range(10, 20))) == [
        [i + 1, i + 2, i + 1, i + 2] for i in range(10, 20)
    ]
    assert client.running("a") == 0


async def test_engine_client_errors_carry_their_codes(client: EngineClient) -> None:
    with pytest.raises(Overloaded, match="needs 10 bytes of 5"):
        await client.load(load("fail"))
    with pytest.raises(ModelNotFound):
        await collect(client, "unknown", [1])
    await client.load(load("a"))
    with pytest.raises(EngineFault, match="a step broke"):
        await collect(client, "a", [FAULT])


async def test_engine_client_restores_the_budget_that_a_model_exceeds(client: EngineClient) -> None:
    with pytest.raises(ModelTooLarge, match="it needs 200000 bytes") as caught:
        await client.load(Load("big", Checkpoint(model_dir="/nowhere", weight_bytes=200_000)))
    assert caught.value.limit == BUDGET_BYTES


async def test_engine_client_aborts_the_row_of_a_closed_stream(client: EngineClient, tmp_path: Path) -> None:
    await client.load(load("a"))
    stream = client.generate("a", request_of(1, 2, max_tokens=100_000))
    assert isinstance(stream, AsyncGenerator)
    await anext(stream)
    await stream.aclose()
    cancelled = asyncio.create_task(collect(client, "a", [STALL]))
    await until(lambda: client.running("a") == 1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert client.running("a") == 0
    await client.unload("a")  # a round trip: the aborts came before it
    assert [entry["what"] for entry in journal(tmp_path)].count("abort") == 2


async def test_engine_client_unload_ends_streams_and_drain_waits(client: EngineClient) -> None:
    await client.load(load("a"))
    running = asyncio.create_task(collect(client, "a", [STALL]))
    await until(lambda: client.running("a"))
    assert not await client.drain("a", 0.02)
    await client.unload("a")
    with pytest.raises(Unavailable, match="unloaded"):
        await running
    assert await client.drain("a", 1.0)


async def test_engine_client_separates_a_cancelled_load_from_the_next(client: EngineClient, tmp_path: Path) -> None:
    first = asyncio.create_task(client.load(load("slow")))
    await until(lambda: any(entry["what"] == "load" for entry in journal(tmp_path)))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await client.unload("slow")
    assert (await client.load(load("slow"))).model_id == "slow"


async def test_engine_client_restarts_a_dead_engine(client: EngineClient, listener: RecordingListener) -> None:
    await client.load(load("a"))
    await client.load(load("b"))
    bystander = asyncio.create_task(collect(client, "b", [STALL]))
    await until(lambda: client.running("b"))
    with pytest.raises(Unavailable, match="SIGKILL"):
        await collect(client, "a", [KILL])
    with pytest.raises(Unavailable):
        await bystander
    await client.wait_ready()
    assert [death.stepping for death in listener.deaths] == ["a"]
    assert client.restarts == 1
    await client.load(load("b"))
    assert await collect(client, "b", [5], 2) == [6, 6]


async def test_engine_client_blames_no_model_for_an_idle_crash(
    client: EngineClient, listener: RecordingListener
) -> None:
    await client.load(load("a"))
    await collect(client, "a", [5], 2)
    assert client.hello is not None
    os.kill(client.hello.pid, signal.SIGKILL)
    while client.restarts == 0:
        await client.changes.wait(5.0)
    assert listener.deaths[0].stepping is None
    assert listener.deaths[0].loading == ()


async def test_engine_client_blames_a_model_of_a_background_step(
    client: EngineClient, listener: RecordingListener, command: Command
) -> None:
    """Idle turns run models to capture their graphs: without a name the engine would die of the same one for ever."""
    await client.load(load("a"))
    assert client.hello is not None
    assert command.marker_path is not None
    CrashMarker(command.marker_path).mark("a")
    os.kill(client.hello.pid, signal.SIGKILL)
    while client.restarts == 0:
        await client.changes.wait(5.0)
    assert listener.deaths[0].stepping == "a"


async def test_engine_client_fails_a_load_at_a_crash(client: EngineClient, listener: RecordingListener) -> None:
    with pytest.raises(Unavailable):
        await client.load(load("deadly"))
    assert listener.deaths[0].loading == ("deadly",)


async def test_engine_client_kills_a_hanging_engine() -> None:
    client = EngineClient(EngineConfig(), command=fake_command(), restart=dataclasses.replace(FAST, silence_s=0.5))
    listener = RecordingListener()
    client.listen(listener)
    client.start()
    await client.wait_ready()
    await client.load(load("a"))
    hung = asyncio.create_task(collect(client, "a", [STALL]))
    for _ in range(40):
        # an engine that sends anything is not hung
        await collect(client, "a", [5], 10)
    assert client.restarts == 0
    with pytest.raises(Unavailable, match=r"sent nothing for 0.5 s"):
        await hung
    await client.wait_ready()
    assert [death.stepping for death in listener.deaths] == ["a"]
    await client.load(load("a"))
    assert await collect(client, "a", [5], 2) == [6, 6]
    await client.stop(0.0)


@pytest.mark.parametrize(
    ("silence_s", "device", "expected_s"),
    [(0.0, "cpu", -1.0), (0.0, "cuda:0", 300.0), (7.0, "cpu", 7.0), (-1.0, "cpu", -1.0)],
)
def test_engine_client_silence_limit(silence_s: float, device: str, expected_s: float) -> None:
    assert RestartPolicy(silence_s=silence_s).silence_on(device) == expected_s


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40), st.integers(1, 10))
def test_silence_counts_observations_with_work_and_without_a_message(
    observations: list[tuple[bool, bool]], limit: int
) -> None:
    silence, in_a_row = Silence(float(limit)), 0
    for heard, has_work in observations:
        in_a_row = in_a_row + 1 if has_work and not heard else 0
        assert silence.exceeds_limit(1.0, heard=heard, has_work=has_work) == (in_a_row >= limit)


async def test_engine_client_gives_up_an_engine_that_never_starts() -> None:
    client = EngineClient(EngineConfig(), command=fake_command(stillborn=True), restart=FAST)
    client.start()
    with pytest.raises(Unavailable, match="exited with code 3"):
        await client.wait_ready()
    assert client.state is EngineState.STOPPED
    with pytest.raises(Unavailable):
        await client.load(load("a"))
    await client.stop(0.0)


async def test_engine_client_starts_an_unfit_engine_once(tmp_path: Path) -> None:
    command = fake_command(unfit="no such device: use another", journal=tmp_path / "journal")
    client = EngineClient(EngineConfig(), command=command, restart=FAST)
    client.start()
    with pytest.raises(Unavailable, match="no such device"):
        await client.wait_ready()
    assert client.state is EngineState.STOPPED
    assert [entry["what"] for entry in journal(tmp_path)] == ["start"]
    await client.stop(0.0)


async def test_engine_client_stop_lets_streams_finish() -> None:
    client = EngineClient(EngineConfig(), command=fake_command(), restart=FAST)
    client.start()
    await client.wait_ready()
    await client.load(load("a"))
    running = asyncio.create_task(collect(client, "a", [7], 20))
    await until(lambda: client.running("a"))
    await client.stop(10.0)
    assert await running == [8] * 20


def test_crash_marker_survives_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "crash-marker"
    reader = CrashMarker(path)
    assert reader.read() is None
    writer = CrashMarker(path)
    writer.mark("org/ä-model")
    assert reader.read() == "org/ä-model"
    writer.mark("b")
    assert reader.read() == "b"
    writer.mark("")
    assert reader.read() is None


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6))
def test_merge_rows_keeps_every_token_in_order(parts: list[list[int]]) -> None:
    rows = [RowTokens(1, tuple(part), cached_tokens=3 if i == 0 else None) for i, part in enumerate(parts)]
    rows[-1] = RowTokens(1, tuple(parts[-1]), FinishReason.EOS, 2, cached_tokens=rows[-1].cached_tokens)
    merged = merge_rows(rows)
    assert merged.tokens == tuple(token for part in parts for token in part)
    assert (merged.finish, merged.stop_token, merged.cached_tokens) == (FinishReason.EOS, 2, 3)


async def test_row_stream_merges_for_a_slow_consumer() -> None:
    stream = RowStream("a")
    for token in range(5):
        stream.put(RowTokens(1, (token,)))
    stream.fail(RepertoryError("gone"))
    assert (await stream.take()).tokens == (0, 1, 2, 3, 4)
    with pytest.raises(RepertoryError, match="gone"):
        await stream.take()


async def test_pacer_wakes_a_fast_stream_for_several_rows() -> None:
    pace = DeliveryPacer()
    streams = [RowStream("a", event_s=0.001) for _ in range(10)]
    for stream in streams:
        pace.opened(stream)
    first = streams[0]
    pace.deliver(first, RowTokens(1, (1,)), now_s=100.0)
    assert (await first.take()).tokens == (1,)  # a first row is never held
    reader = asyncio.create_task(first.take())
    await asyncio.sleep(0)
    pace.deliver(first, RowTokens(1, (2,)), now_s=100.004)  # ten streams at a millisecond each: 10 ms apart
    await asyncio.sleep(0)
    assert not reader.done()
    pace.deliver(first, RowTokens(1, (3,)), now_s=100.011)
    assert (await reader).tokens == (2, 3)


async def test_pacer_releases_held_rows_and_ends() -> None:
    pace = DeliveryPacer()
    stream, ending = RowStream("a", event_s=0.002), RowStream("a", event_s=0.002)
    for each in (stream, ending):
        pace.opened(each)
        pace.deliver(each, RowTokens(1, (1,)), now_s=100.0)
        await each.take()
    pace.deliver(stream, RowTokens(1, (2,)), now_s=100.001)
    assert (await asyncio.wait_for(stream.take(), 5.0)).tokens == (2,)
    pace.deliver(ending, RowTokens(2, (3,), FinishReason.LENGTH), now_s=100.001)
    assert (await asyncio.wait_for(ending.take(), 5.0)).finish is FinishReason.LENGTH


async def test_pacer_leaves_few_streams_alone() -> None:
    pace = DeliveryPacer()
    stream = RowStream("a", event_s=33e-6)
    pace.opened(stream)
    for step in range(3):
        pace.deliver(stream, RowTokens(1, (step,)), now_s=100.0 + step * 0.001)
        assert (await stream.take()).tokens == (step,)
