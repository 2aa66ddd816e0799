"""Keeps Envoy's clusters equal to the loaded copies, and counts the uses that Envoy reports. Workers take the place of Envoy in the same way."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from common.changes import Changes
from common.model_state import CopyState
from mesh.envoy.interfaces import ClusterFigures, ControlStream, EnvoyStats, KeyCalls
from mesh.envoy.name_table import Names, listed_clusters, listed_names
from mesh.envoy.plan import CarriedName, Carrier, Cluster, ClusterPlanner, Here, Role, name_prefix, withdrawn
from mesh.envoy.view import CarriedNames
from mesh.observability.metrics import Metrics
from mesh.placement.copies import LocalCopies
from mesh.routing.carried_answers import CarriedAnswers, CarriedCount

logger = logging.getLogger(__name__)

_LINGER_S = 10.0  # how long the cluster of an unloaded model leads to the mesh; without it, calls in transit would fail
_MIN_INTERVAL_S = 0.02
_LIST_S = 1.0
_SCRAPE_S = 1.0
_DRAIN_SCRAPE_S = 0.05
_WORKERS_S = 0.01  # Envoy confirms a change a moment before all its threads follow it

_PREFIXES = {
    name_prefix(carrier, from_peers=from_peers): (carrier, from_peers)
    for carrier in Carrier
    for from_peers in (False, True)
}


@dataclass(frozen=True, slots=True)
class _Gone:
    cluster: Cluster
    until_s: float


class DataPlane:
    """`answers` gets the counts of calls to this pod's runtime. `here` returns this pod's addresses and peer headers. `is_ready`: whether the pod knows what its runtime holds.

    `write_files` writes the files that Envoy reads, if they have changed, from the calls that a copy may have at once and the names to list.
    """

    def __init__(
        self,
        names: CarriedNames,
        copies: LocalCopies,
        changes: Changes,
        metrics: Metrics,
        stats: EnvoyStats,
        answers: CarriedAnswers,
        *,
        here: Callable[[], Here],
        is_ready: Callable[[], bool],
        write_files: Callable[[int, Names], None],
    ) -> None:
        self._names = names
        self._copies = copies
        self._changes = changes
        self._metrics = metrics
        self._stats = stats
        self._answers = answers
        self._here = here
        self._is_ready = is_ready
        self._write_files = write_files
        self._control: ControlStream | None = None
        self._planner = ClusterPlanner()
        self._gone: dict[str, _Gone] = {}
        self._adopted: dict[str, Cluster] = {}  # since the last publication
        self._generation = 0
        self._listed: Names = {}
        self._listed_clusters: frozenset[str] = frozenset()
        self._models: dict[str, tuple[str, Carrier, Role]] = {}  # by the cluster's name in Envoy's statistics
        self._started: dict[str, int] = {}
        self._key_calls: Mapping[KeyCalls, int] = {}
        self._draining: set[str] = set()
        self._drain_began = asyncio.Event()

    def control_by(self, control: ControlStream) -> None:
        self._control = control

    def adopt(self, names: frozenset[str]) -> None:
        """Lead clusters that an Envoy has from before this mesh's start to the mesh, until their models are loaded or they go."""
        here, until_s = self._here(), time.monotonic() + _LINGER_S
        for full_name in names:
            prefix, _, name = full_name.partition("/")
            if prefix in _PREFIXES and full_name not in self._planner.clusters:
                carrier, from_peers = _PREFIXES[prefix]
                self._adopted[full_name] = withdrawn(CarriedName(name, name, carrier, from_peers=from_peers), here)
                self._gone[full_name] = _Gone(self._adopted[full_name], until_s)
        self._changes.notify()

    async def run(self) -> None:
        if (before := await self._stats.figures()) is not None:
            # An Envoy that ran before this process has calls that an earlier one counted.
            self._started = {stat: figures.started for stat, figures in before.clusters.items()}
            self._key_calls = before.keys
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._list())
            tasks.create_task(self._scrape())

    async def withdraw(self, model_id: str) -> None:
        """Return when Envoy sends this pod's copy no further calls and its running ones are counted. The copy is unloading already."""
        if self._control is None or not self._is_ready():
            return
        self._draining.add(model_id)
        self._drain_began.set()
        await self._count()  # an idle cluster's figures end with it
        await self._control.confirmed(self._publish())
        await asyncio.sleep(_WORKERS_S)
        await self._count()

    async def _follow(self) -> None:
        while True:
            seen = self._changes.version
            if self._is_ready():
                self._publish()
            await asyncio.sleep(_MIN_INTERVAL_S)
            await self._changes.wait(_SCRAPE_S, since=seen)

    async def _list(self) -> None:
        """List names in the routes' table once Envoy has their clusters: a listed name without a cluster would fail its calls."""
        assert self._control is not None
        while True:
            await asyncio.sleep(_LIST_S)
            names = listed_names(self._listed, self._planner.clusters)
            if names == self._listed:
                continue
            if not await self._control.confirmed(self._generation):
                names = {}
            if self._write(names):
                self._listed, self._listed_clusters = names, listed_clusters(names)
                # Envoy reads the file a moment later, and needs the clusters of the names that it had until then.
                until_s = time.monotonic() + _LINGER_S
                self._gone = {name: replace(gone, until_s=until_s) for name, gone in self._gone.items()}

    def _publish(self) -> int:
        assert self._control is not None
        here, now_s = self._here(), time.monotonic()
        change = self._planner.plan(self._names.changed(), here)
        withdrawn_now = {}
        for name, cluster in change.removed.items():
            plain = CarriedName(
                name.partition("/")[2], cluster.model_id, cluster.carrier, from_peers=cluster.from_peers
            )
            withdrawn_now[name] = withdrawn(plain, here)
            self._gone[name] = _Gone(withdrawn_now[name], now_s + _LINGER_S)
        for name, cluster in change.changed.items():
            self._gone.pop(name, None)
            self._models[cluster.stat_name] = cluster.model_id, cluster.carrier, cluster.role
        ended = [
            name for name, gone in self._gone.items() if gone.until_s <= now_s and name not in self._listed_clusters
        ]
        for name in ended:
            del self._gone[name]
        self._generation = self._control.publish({**self._adopted, **withdrawn_now, **change.changed}, ended)
        self._adopted = {}
        self._write(self._listed)
        return self._generation

    def _write(self, names: Names) -> bool:
        """Write Envoy's files, and return whether they are written."""
        try:
            self._write_files(self._names.limit, names)
        except OSError as error:
            logger.error("Envoy's files could not be written: %s; it continues with those that it has", error)
            return False
        return True

    async def _scrape(self) -> None:
        while True:
            self._draining = {model_id for model_id in self._draining if self._is_unloading(model_id)}
            if self._draining:
                await asyncio.sleep(_DRAIN_SCRAPE_S)
            else:
                self._drain_began.clear()
                await _first(self._drain_began, _SCRAPE_S)
            await self._count()

    def _is_unloading(self, model_id: str) -> bool:
        copy = self._copies.get(model_id)
        return copy is not None and copy.state is CopyState.UNLOADING

    async def _count(self) -> None:
        """Take over what Envoy has counted since the last time."""
        known = await self._stats.figures()
        if known is None:
            self._answers.note({}, time.monotonic())
            return
        figures = known.clusters
        self._count_keys(known.keys)
        self._count_uses(figures)
        running: dict[str, int] = {}
        for stat, (model_id, _, role) in self._models.items():
            if role is Role.LOCAL:
                running[model_id] = running.get(model_id, 0) + figures.get(stat, ClusterFigures()).active
        for model_id, active in running.items():
            self._copies.set_carried(model_id, active)
        self._answers.note(self._local_counts(figures), time.monotonic())
        self._started = {stat: count for stat, count in self._started.items() if stat in figures}
        kept = {cluster.stat_name for cluster in self._planner.clusters.values()}
        self._models = {
            stat: known
            for stat, known in self._models.items()
            if stat in kept or figures.get(stat, ClusterFigures()).active
        }

    def _local_counts(self, figures: Mapping[str, ClusterFigures]) -> dict[str, CarriedCount]:
        return {
            stat: CarriedCount(model_id, found.started, found.active, found.answered)
            for stat, (model_id, _, role) in self._models.items()
            if role is Role.LOCAL and (found := figures.get(stat)) is not None
        }

    def _count_keys(self, calls: Mapping[KeyCalls, int]) -> None:
        for call, count in calls.items():
            if fresh := _fresh(count, self._key_calls.get(call, 0)):
                self._metrics.carried_by_key(call.key, call.carrier, call.code, fresh)
        self._key_calls = calls

    def _count_uses(self, figures: Mapping[str, ClusterFigures]) -> None:
        for stat, (model_id, carrier, role) in self._models.items():
            known = figures.get(stat)
            if known is None:
                continue
            fresh = _fresh(known.started, self._started.get(stat, 0))
            self._started[stat] = known.started
            if fresh:
                self._copies.count_carried(model_id, fresh, is_local=role is Role.LOCAL)
                self._metrics.carried(model_id, carrier, fresh)
            if known.latency_s:
                self._metrics.carried_latency(model_id, carrier, known.latency_s)


def _fresh(count: int, before: int) -> int:
    """Return how much a counter has grown. A restarted Envoy counts from 0."""
    return count - before if count >= before else count


async def _first(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
