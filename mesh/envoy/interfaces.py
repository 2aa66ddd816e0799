"""Defines the interfaces of the data plane to Envoy: its control stream and its statistics. Workers have the same ones."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mesh.envoy.plan import Carrier, Cluster


@dataclass(frozen=True, slots=True)
class ClusterFigures:
    """`started`: calls since the cluster exists. `active`: calls that have not ended. `answered`: calls whose response has begun.

    `latency_s`: the recent median, 0 if unknown.
    """

    started: int = 0
    active: int = 0
    answered: int = 0
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class KeyCalls:
    """Calls that have ended with a status, by the name of the caller's key."""

    key: str
    carrier: Carrier
    code: str


@dataclass(frozen=True, slots=True)
class EnvoyFigures:
    """`clusters`: by the clusters' names in the statistics. `keys`: the number of calls that copies have answered past the mesh."""

    clusters: Mapping[str, ClusterFigures]
    keys: Mapping[KeyCalls, int]


class ControlStream(Protocol):
    def publish(self, changed: Mapping[str, Cluster], removed: Iterable[str]) -> int:
        """Add or replace clusters of every connected Envoy and remove others, by name. Return the number of this generation."""
        ...

    async def confirmed(self, generation: int) -> bool:
        """Return when every connected Envoy uses this generation or a later one; at once if none is connected.

        False: one of them has refused clusters, or does not answer.
        """
        ...


class EnvoyStats(Protocol):
    async def figures(self) -> EnvoyFigures | None:
        """Return the figures since Envoy's start; None if it does not answer."""
