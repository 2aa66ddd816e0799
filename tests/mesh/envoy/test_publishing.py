"""What DataPlane publishes, without an Envoy."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

import pytest

from common.changes import Changes
from common.model_key import CopySettings
from mesh.envoy.data_plane import DataPlane
from mesh.envoy.interfaces import ClusterFigures
from mesh.envoy.plan import CarriedName, Carrier, Cluster, Here
from mesh.envoy.view import CarriedNames
from mesh.observability.metrics import Metrics
from mesh.placement.copies import LocalCopies

HERE = Here({Carrier.GRPC: "unix:/runtime"}, {Carrier.GRPC: "unix:/mesh"})


class FakeControl:
    """An Envoy that takes every change at once."""

    def __init__(self) -> None:
        self.published: dict[str, Cluster] = {}

    def publish(self, clusters: Mapping[str, Cluster]) -> int:
        self.published = dict(clusters)
        return 1

    async def confirmed(self, generation: int) -> None:
        pass


class FakeStats:
    async def figures(self) -> Mapping[str, ClusterFigures]:
        return {}


async def test_withdraw_publishes_although_the_files_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    def fail(limit: int) -> None:
        raise OSError(28, "No space left on device")

    names = SimpleNamespace(list=lambda: [CarriedName("m", "m", Carrier.GRPC, 0.0)], limit=0)
    control, changes = FakeControl(), Changes()
    data_plane = DataPlane(
        cast("CarriedNames", names),
        LocalCopies(changes, lambda _: CopySettings()),
        changes,
        Metrics(),
        FakeStats(),
        here=lambda: HERE,
        is_ready=lambda: True,
        write_files=fail,
    )
    data_plane.control_by(control)
    await data_plane.withdraw("m")
    assert list(control.published) == ["grpc/m"]
    assert "No space left on device" in caplog.text
