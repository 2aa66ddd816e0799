"""Three engines of two devices in one process, on fake backends: what the broker decides and what the engines do fit together."""

import asyncio
import logging
import random

import pytest

from common.changes import Changes
from runtime.engine.interfaces import KvGeometry
from runtime.engine_client.slab_sharing import SlabSharing
from runtime.ipc.messages import Command, EngineStats, Hello
from runtime.types import FinishReason
from tests.support.engine_stage import Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec

KV = KvGeometry(4, 4, 4, 1, 32, 64)  # 16 tokens a slab
CAPACITY = 24
DEVICES = {"one": (0,), "two": (1,), "pair": (0, 1)}


class StageEngine:
    """Implements SharingEngine over an engine loop that the test turns."""

    def __init__(self, specs: dict[str, FakeSpec]) -> None:
        self.stage = Stage(FakeBackend(specs, total_slabs=CAPACITY, committed=0), shares_device=True)
        slab_bytes = FakeBackend.slab_bytes
        self.hello: Hello | None = Hello(1, "fake", "Fake", CAPACITY * slab_bytes, 0, slab_bytes, 256)
        self.stats: EngineStats | None = None
        self.restarts = 0
        for name in specs:
            self.stage.load(name)

    def running(self, model_id: str) -> int:
        answers = self.stage.answers.values()
        return sum(answer.last is None and answer.add.model_id == model_id for answer in answers)

    def send(self, command: Command) -> bool:
        self.stage.inbox.put(command)
        return True

    def turn(self) -> None:
        seen = len(self.stage.events)
        self.stage.turn()
        for event in self.stage.events[seen:]:
            if isinstance(event, EngineStats):
                self.stats = event


class Devices:
    def __init__(self, rng: random.Random) -> None:
        self.engines = {
            name: StageEngine(
                {f"{name}-{letter}": FakeSpec(rng.randint(3, 11), eos=(), kv=KV, load_polls=1) for letter in "ab"}
            )
            for name in DEVICES
        }
        self.sharing = SlabSharing(Changes(), {})
        for name, engine in self.engines.items():
            self.sharing.add(engine, DEVICES[name], 0, is_home=name != "pair")

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            for engine in self.engines.values():
                engine.turn()
            self.sharing.step(self.engines["one"].stage.now)
            for device in (0, 1):
                held = sum(
                    len(engine.stage.backend.committed)
                    for name, engine in self.engines.items()
                    if device in DEVICES[name]
                )
                assert held <= CAPACITY, {name: len(e.stage.backend.committed) for name, e in self.engines.items()}

    def ask(self, engine: str, letter: str, prompt: list[int], tokens: int = 8) -> None:
        stage = self.engines[engine].stage
        self.sharing.use(f"{engine}-{letter}")
        stage.add(f"{engine}-{letter}", prompt, tokens)

    @property
    def num_open(self) -> int:
        return sum(answer.last is None for engine in self.engines.values() for answer in engine.stage.answers.values())

    def until_quiet(self) -> None:
        for _ in range(8000):
            if not self.num_open:
                return
            self.turn()
        raise AssertionError({name: engine.stage.stats() for name, engine in self.engines.items()})

    def check(self) -> None:
        for engine in self.engines.values():
            engine.stage.check_all()
            assert not engine.stage.failures()
            errors = [answer.last for answer in engine.stage.answers.values() if answer.finish is FinishReason.ERROR]
            assert not errors


@pytest.mark.parametrize("seed", range(12))
async def test_engines_that_share_devices_answer_everything_and_never_hold_too_much(seed: int) -> None:
    rng = random.Random(seed)
    devices = Devices(rng)
    await devices.sharing.admit(devices.engines["pair"])
    devices.turn(20)
    for _ in range(300):
        if rng.random() < 0.15:
            prompt = [rng.randrange(2, 48) for _ in range(rng.randint(1, 12))]
            devices.ask(rng.choice(list(DEVICES)), rng.choice("ab"), prompt, rng.choice([4, 8, 40]))
        devices.turn()
    devices.until_quiet()
    devices.check()
    for engine in devices.engines.values():
        engine.stage.close()


async def test_divided_model_runs_beside_single_ones_that_are_always_busy() -> None:
    devices = Devices(random.Random(1))
    await devices.sharing.admit(devices.engines["pair"])
    devices.turn(20)
    for number in range(2000):
        for name in ("one", "two"):
            if not any(a.last is None for a in devices.engines[name].stage.answers.values()) or number % 50 == 0:
                devices.ask(name, "a", [5, 6], 60)
        if number == 100:
            devices.ask("pair", "a", [7, 8], 20)
            asked = next(reversed(devices.engines["pair"].stage.answers.values()))
        devices.turn()
        if number > 100 and asked.last is not None:
            break
    assert asked.last is not None
    devices.until_quiet()
    devices.check()


async def test_engine_evicts_its_own_idle_models_where_the_driver_has_less_than_expected() -> None:
    """The engine does not hold all of the device, but no other engine has the rest."""
    devices = Devices(random.Random(0))
    for engine in devices.engines.values():
        engine.stage.backend.obtainable_slabs = 14  # of 24, for two models of 9 slabs in turns
    devices.turn(20)
    for letter in "abab":
        devices.ask("one", letter, [5, 6])
        answer = next(reversed(devices.engines["one"].stage.answers.values()))
        devices.turn(100)
        assert answer.finish is FinishReason.LENGTH
    devices.check()


class FaultyEngine(StageEngine):
    """Fails at the first command."""

    num_sent = 0

    def send(self, command: Command) -> bool:
        self.num_sent += 1
        if self.num_sent == 1:
            raise RuntimeError("a fault")
        return super().send(command)


async def test_slab_sharing_goes_on_after_an_exception_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    engine = FaultyEngine({"a": FakeSpec(3, eos=(), kv=KV, load_polls=1)})
    changes = Changes()
    sharing = SlabSharing(changes, {})
    sharing.add(engine, (0,), 0, is_home=True)
    with caplog.at_level(logging.ERROR):
        running = asyncio.create_task(sharing.run())
        async with asyncio.timeout(10):
            while not engine.stage.backend.committed:
                engine.turn()
                changes.notify()
                await asyncio.sleep(0.01)
    running.cancel()
    assert engine.num_sent > 1
    assert "a fault" in caplog.text
    engine.stage.close()
