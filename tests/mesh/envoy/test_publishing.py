"""What DataPlane publishes, without an Envoy."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import pytest

from common.changes import Changes
from common.model_key import CopySettings
from mesh.envoy.data_plane import DataPlane
from mesh.envoy.interfaces import ClusterFigures, EnvoyFigures, KeyCalls
from mesh.envoy.name_table import Names
from mesh.envoy.plan import CarriedName, Carrier, Cluster, Here, PeerCopy, plan_clusters
from mesh.envoy.view import CarriedNames
from mesh.observability.metrics import Metrics
from mesh.placement.copies import LocalCopies
from mesh.routing.carried_answers import CarriedAnswers
from tests.support.waiting import until

HERE = Here({Carrier.GRPC: "unix:/runtime"}, {Carrier.GRPC: "unix:/mesh"})


class FakeControl:
    """An Envoy that takes every change at once, or refuses what it was sent."""

    def __init__(self) -> None:
        self.published: dict[str, Cluster] = {}
        self.takes = True
        self.num_questions = 0

    def publish(self, changed: Mapping[str, Cluster], removed: Iterable[str]) -> int:
        self.published |= changed
        for name in removed:
            del self.published[name]
        return 1

    async def confirmed(self, generation: int) -> bool:
        self.num_questions += 1
        return self.takes


class FakeNames:
    """Lists `carried`, which a test changes. All of its models count as changed each time."""

    limit = 0

    def __init__(self, carried: list[CarriedName]) -> None:
        self._carried = carried
        self._models = set[str]()

    def changed(self) -> dict[str, tuple[CarriedName, ...]]:
        self._models |= {each.model_id for each in self._carried}
        return {
            model_id: tuple(each for each in self._carried if each.model_id == model_id) for model_id in self._models
        }


class FakeStats:
    def __init__(self) -> None:
        self.current = EnvoyFigures({}, {})
        self.num_questions = 0

    async def figures(self) -> EnvoyFigures:
        self.num_questions += 1
        return self.current


class CountingMetrics(Metrics):
    def __init__(self) -> None:
        super().__init__()
        self.by_model = Counter[str]()
        self.by_key = Counter[str]()

    def carried(self, model_id: str, carrier: str, count: int) -> None:
        self.by_model[model_id] += count

    def carried_by_key(self, key: str, carrier: str, code: str, count: int) -> None:
        self.by_key[key] += count


def data_plane_of(
    carried: list[CarriedName],
    control: FakeControl,
    write_files: Callable[[int, Names], None],
    stats: FakeStats | None = None,
    metrics: Metrics | None = None,
    answers: CarriedAnswers | None = None,
) -> DataPlane:
    changes = Changes()
    data_plane = DataPlane(
        cast("CarriedNames", FakeNames(carried)),
        LocalCopies(changes, lambda _: CopySettings()),
        changes,
        metrics or Metrics(),
        stats or FakeStats(),
        answers or CarriedAnswers(),
        here=lambda: HERE,
        is_ready=lambda: True,
        write_files=write_files,
    )
    data_plane.control_by(control)
    return data_plane


async def test_withdraw_publishes_although_the_files_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    def fail(limit: int, names: Names) -> None:
        raise OSError(28, "No space left on device")

    control = FakeControl()
    data_plane = data_plane_of([CarriedName("m", "m", Carrier.GRPC, 0.0)], control, fail)
    await data_plane.withdraw("m")
    assert list(control.published) == ["grpc/m"]
    assert "No space left on device" in caplog.text


async def test_names_are_listed_once_envoy_has_their_clusters() -> None:
    control, listed = FakeControl(), list[tuple[str, ...]]()
    control.takes = False

    def write(limit: int, names: Names) -> None:
        assert all(f"grpc/{name}" in control.published for name in names.get(Carrier.GRPC, ()))
        listed.append(names.get(Carrier.GRPC, ()))

    carried = [CarriedName(name, name, Carrier.GRPC, 0.0) for name in ("m", "n")]
    running = asyncio.create_task(data_plane_of(carried, control, write).run())
    await until(lambda: control.num_questions == 2)
    assert set(listed) == {()}, "Envoy has refused a cluster, so that any of them may be missing"
    control.takes = True
    await until(lambda: listed[-1] == ("m", "n"))
    del carried[1]
    await until(lambda: listed[-1] == ("m",))
    running.cancel()


async def test_calls_that_envoy_carried_before_the_mesh_started_are_not_counted_again() -> None:
    stats, metrics = FakeStats(), CountingMetrics()
    carried = [CarriedName("m", "m", Carrier.GRPC, 0.0)]
    call = KeyCalls("key", Carrier.GRPC, "OK")
    stat = plan_clusters(carried, HERE)["grpc/m"].stat_name

    def carry(calls: int) -> None:
        stats.current = EnvoyFigures({stat: ClusterFigures(started=calls)}, {call: calls})

    carry(1000)
    running = asyncio.create_task(data_plane_of(carried, FakeControl(), lambda *_: None, stats, metrics).run())
    await until(lambda: stats.num_questions == 1)
    carry(1003)
    await until(lambda: metrics.by_model["m"] == metrics.by_key["key"] == 3)
    running.cancel()


async def test_calls_that_envoy_carries_to_this_pod_are_noted_with_their_answers() -> None:
    stats, answers = FakeStats(), CarriedAnswers()
    local, peers = (
        CarriedName("m", "m", Carrier.GRPC, 0.0),
        CarriedName("n", "n", Carrier.GRPC, peers=(PeerCopy("peer", "host:1"),)),
    )
    by_name = {name: cluster.stat_name for name, cluster in plan_clusters([local, peers], HERE).items()}
    waiting = ClusterFigures(started=3, active=3)
    stats.current = EnvoyFigures({by_name["grpc/m"]: waiting, by_name["grpc/n"]: waiting}, {})
    running = asyncio.create_task(
        data_plane_of([local, peers], FakeControl(), lambda *_: None, stats, answers=answers).run()
    )
    await until(lambda: bool(answers.overdue))
    assert answers.overdue == {"m": 3}, "the calls of the other name wait for another pod"
    assert answers.answered_s == 0.0
    stats.current = EnvoyFigures({by_name["grpc/m"]: ClusterFigures(started=3, active=2, answered=1)}, {})
    await until(lambda: answers.answered_s > 0.0)
    running.cancel()
