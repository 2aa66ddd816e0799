"""Plans the clusters through which Envoy carries calls: one for each name of a loaded model and each carrier.

A cluster has tiers. Envoy sends a call to the first tier; a call that its endpoint refuses because it does not have the model goes to the next
one. The last tier is this pod's mesh, which takes the call as if it were the first to get it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

_LOCAL_PATIENCE_S = (
    0.5  # a local copy that makes callers wait longer than a peer's by more than this comes after the peers
)
_WEIGHTS = (
    (0.05, 8),
    (0.2, 4),
    (1.0, 2),
)  # weight of a peer by its expected wait in seconds: coarse, so that few changes are pushed
_LEAST_WEIGHT = 1
_STAT_BYTES = 10
STAT_NAMES = "repertory"
"""What the names of models' clusters in Envoy's statistics begin with, before an underscore."""


class Carrier(StrEnum):
    GRPC = "grpc"
    HTTP = "http"


class Role(StrEnum):
    """What the first tier of a cluster is. Envoy counts each role apart, so that calls that a copy still has can be seen after a change."""

    LOCAL = "local"
    PEERS = "peers"
    MESH = "mesh"


@dataclass(frozen=True, slots=True)
class PeerCopy:
    """A loaded copy of another pod. `secure`: the address expects mutual TLS. `wait_s`: the expected wait of a call there."""

    instance_id: str
    address: str
    secure: bool = False
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CarriedName:
    """A name whose calls Envoy may carry by itself. `local_wait_s`: the expected wait at this pod's copy, None without one.

    `from_peers`: calls of other pods, which name the model by its id and end here. `generation`: which load of this pod's copy it is.
    """

    name: str
    model_id: str
    carrier: Carrier
    local_wait_s: float | None = None
    peers: tuple[PeerCopy, ...] = ()
    from_peers: bool = False
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Here:
    """This pod: the addresses of its runtime and its mesh by carrier, and what its calls of other pods carry.

    `pings_runtime`: the runtime accepts the pings by which a frozen process is found. Others end the connections of silent calls over them.
    """

    runtime: dict[Carrier, str]
    mesh: dict[Carrier, str]
    hop: str = ""
    peer_key: str = ""
    pings_runtime: bool = True


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`hop` and `peer_key` are headers that only peers get."""

    address: str
    hop: str = ""
    peer_key: str = ""
    weight: int = _LEAST_WEIGHT
    secure: bool = False


@dataclass(frozen=True, slots=True)
class Cluster:
    """`stat_name`: its name in Envoy's statistics, in which names may not hold every character. Each load counts from 0, under a name of its own."""

    name: str
    model_id: str
    carrier: Carrier
    role: Role
    tiers: tuple[tuple[Endpoint, ...], ...]
    from_peers: bool = False
    generation: int = 0
    pings: bool = True
    stat_name: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(f"{self.generation}/{self.name}".encode(), digest_size=_STAT_BYTES).hexdigest()
        object.__setattr__(self, "stat_name", f"{STAT_NAMES}_{self.role}_{digest}")

    @property
    def called_name(self) -> str:
        """The name by which calls name the model."""
        return self.name.partition("/")[2]

    @property
    def meets_peers(self) -> bool:
        """Whether its calls come from other pods or may go to one, so that they have headers that only peers send."""
        return self.from_peers or any(endpoint.hop or endpoint.peer_key for tier in self.tiers for endpoint in tier)


def name_prefix(carrier: Carrier, *, from_peers: bool) -> str:
    """Return what clusters' names begin with, before a slash and the model's name."""
    return f"{carrier}-peers" if from_peers else carrier


def is_plain(name: str) -> bool:
    """Whether a name can be the whole value of a header: a comma separates values, and text that is not ASCII needs a binary header."""
    return name.isascii() and name.isprintable() and "," not in name and name.strip() == name


def plan_clusters(names: Iterable[CarriedName], here: Here) -> dict[str, Cluster]:
    """Return the clusters by name. A name without a copy gets none, so that the mesh takes its calls."""
    clusters = (_cluster(carried, here) for carried in names if is_plain(carried.name))
    return {cluster.name: cluster for cluster in clusters if cluster is not None}


@dataclass(frozen=True, slots=True)
class PlanChange:
    """The clusters, by name, that are new or different, and those that are no longer planned."""

    changed: Mapping[str, Cluster]
    removed: Mapping[str, Cluster]


class ClusterPlanner:
    """Plans like `plan_clusters`, and only for models whose names have changed: few of thousands do.

    `clusters`: those of all models by name.
    """

    def __init__(self) -> None:
        self.clusters: dict[str, Cluster] = {}
        self._here: Here | None = None
        self._names: dict[str, tuple[CarriedName, ...]] = {}  # by model
        self._planned: dict[str, dict[str, Cluster]] = {}  # by model

    def plan(self, names: Mapping[str, tuple[CarriedName, ...]], here: Here) -> PlanChange:
        """Plan the clusters of these models. `names`: all names of each one, none for a model whose clusters go. Other models keep theirs."""
        if here != self._here:
            self._here, names = here, {**self._names, **names}
        before: dict[str, Cluster] = {}
        after: dict[str, Cluster] = {}
        for model_id, carried in names.items():
            before |= self._planned.pop(model_id, {})
            self._names.pop(model_id, None)
            if carried:
                self._names[model_id] = carried
                self._planned[model_id] = plan_clusters(carried, here)
                after |= self._planned[model_id]
        change = PlanChange(
            changed={name: cluster for name, cluster in after.items() if before.get(name) != cluster},
            removed={name: cluster for name, cluster in before.items() if name not in after},
        )
        for name in change.removed:
            del self.clusters[name]
        self.clusters |= change.changed
        return change


def withdrawn(carried: CarriedName, here: Here) -> Cluster:
    """Return a cluster that leads to the mesh only. It stays for a while after its model has gone: calls may be on their way to it."""
    # A call that another pod sent must not be sent on by this one.
    hop, peer_key = (here.hop, here.peer_key) if carried.from_peers else ("", "")
    mesh = Endpoint(here.mesh[carried.carrier], hop, peer_key)
    name = f"{name_prefix(carried.carrier, from_peers=carried.from_peers)}/{carried.name}"
    return Cluster(
        name, carried.model_id, carried.carrier, Role.MESH, ((mesh,),), carried.from_peers, carried.generation
    )


def _cluster(carried: CarriedName, here: Here) -> Cluster | None:
    tiers: list[tuple[Role, tuple[Endpoint, ...]]] = []
    if carried.local_wait_s is not None:
        tiers.append((Role.LOCAL, (Endpoint(here.runtime[carried.carrier]),)))
    if carried.peers:
        tiers.append((Role.PEERS, tuple(_peer(peer, here) for peer in carried.peers)))
    if not tiers:
        return None
    if len(tiers) > 1 and _is_slow(carried):
        tiers.reverse()
    base = withdrawn(carried, here)
    return replace(
        base,
        role=tiers[0][0],
        tiers=(*(endpoints for _, endpoints in tiers), *base.tiers),
        pings=carried.local_wait_s is None or here.pings_runtime,
    )


def _is_slow(carried: CarriedName) -> bool:
    best_s = min(peer.wait_s for peer in carried.peers)
    return carried.local_wait_s is not None and carried.local_wait_s > best_s + _LOCAL_PATIENCE_S


def _peer(peer: PeerCopy, here: Here) -> Endpoint:
    weight = next((weight for below_s, weight in _WEIGHTS if peer.wait_s < below_s), _LEAST_WEIGHT)
    return Endpoint(peer.address, here.hop, here.peer_key, weight, peer.secure)
