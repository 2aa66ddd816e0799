"""Lists the names whose calls Envoy, or workers, may carry now, from the registry, this pod's copies and the other pods' reports."""

import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.addresses import parse_address
from common.errors import ConfigError
from common.model_state import CopyState
from mesh.envoy.changed_models import ChangedModels
from mesh.envoy.plan import CarriedName, Carrier, PeerCopy, is_plain
from mesh.errors import NotFound
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.model_states import ModelStates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import InstanceRecord
from mesh.registry.registry import Registry
from mesh.routing.copy_selection import Candidate, expected_wait_s


@dataclass(frozen=True, slots=True)
class _World:
    """What the names of every model depend on. `limit`: as in CarriedNames."""

    is_cut_off: bool
    is_serving: bool
    carriers: tuple[Carrier, ...]
    pods: frozenset[str]
    limit: int


class CarriedNames:
    """`secure_address`: returns the address for mutual TLS of a pod's address, empty if it has none.

    `is_cut_off`: whether only this pod has lost the store, so that its knowledge may be out of date. `is_doubted`: whether the runtime was mute and has
    not answered since, so that only the mesh sends calls to it, which can take them back. `carriers`: those that the settings allow.
    `carries_limited`: calls of copies with a limit of concurrent calls are carried, by a data plane that counts them.
    """

    def __init__(
        self,
        registry: Registry,
        states: ModelStates,
        monitor: RuntimeMonitor,
        copies: LocalCopies,
        *,
        secure_address: Callable[[str], str],
        is_cut_off: Callable[[], bool],
        is_doubted: Callable[[], bool] = lambda: False,
        carriers: frozenset[Carrier],
        carries_limited: bool = True,
    ) -> None:
        self._registry = registry
        self._states = states
        self._monitor = monitor
        self._copies = copies
        self._secure_address = secure_address
        self._is_cut_off = is_cut_off
        self._is_doubted = is_doubted
        self._carriers = carriers
        self._carries_limited = carries_limited
        self._changed = ChangedModels(registry, copies)
        self._world: _World | None = None
        self._listed: dict[str, tuple[CarriedName, ...]] = {}  # by model

    @property
    def limit(self) -> int:
        """The calls that a carried copy may have at once, as of the last call of `changed`; 0 for any number."""
        return self._world.limit if self._world is not None else 0

    def changed(self) -> dict[str, tuple[CarriedName, ...]]:
        """Return the names of each model whose names have changed since the last call; none for a model without a copy that can take calls."""
        pods = {pod_id: pod for pod_id, pod in self._states.pods().items() if pod_id != self._registry.instances.own_id}
        world = _World(
            self._is_cut_off(),
            self._monitor.is_serving and not self._is_doubted(),
            tuple(carrier for carrier in Carrier if carrier in self._carriers and self._can_carry(carrier)),
            frozenset(pods),
            max((copy.max_concurrency for copy in self._copies if copy.is_loaded), default=0)
            if self._carries_limited
            else 0,
        )
        models = self._changed.take(self._monitor.snapshot)
        if models is None or world != self._world:
            self._world = world
            models = {copy.model_id for copy in self._copies}.union(
                self._listed, *(pod.copies for pod in pods.values())
            )
        found = {}
        for model_id in models:
            names = self._names_to_carry(model_id, world, pods)
            if names != self._listed.get(model_id, ()):
                found[model_id] = names
        for model_id, names in found.items():
            if names:
                self._listed[model_id] = names
            else:
                del self._listed[model_id]
        return found

    def _names_to_carry(self, model_id: str, world: _World, pods: dict[str, InstanceRecord]) -> tuple[CarriedName, ...]:
        if world.is_cut_off:
            return ()
        wait_s, generation = None, 0
        if (copy := self._copies.get(model_id)) is not None and self._takes_calls(copy, world):
            wait_s, generation = self._local_wait_s(model_id), copy.started_ms
        names = [name for name in self._names_of(model_id) if is_plain(name)]
        has_adapters = any(self._changed.has_adapters(name) for name in (*names, model_id))
        found = []
        for carrier in world.carriers:
            if has_adapters and carrier is Carrier.GRPC:
                continue
            peers = self._peers(model_id, carrier, pods)
            if wait_s is not None or peers:
                found += [CarriedName(name, model_id, carrier, wait_s, peers, generation=generation) for name in names]
            if wait_s is not None and pods:
                found.append(CarriedName(model_id, model_id, carrier, wait_s, from_peers=True, generation=generation))
        return tuple(found)

    def _can_carry(self, carrier: Carrier) -> bool:
        """Return whether calls may pass unread: no method of a foreign runtime needs the model's id written into its message."""
        limits, snapshot = self._monitor.limits, self._monitor.snapshot
        if carrier is Carrier.HTTP or limits is None:
            return True
        return limits.allow_any_method and not (snapshot.foreign and limits.allowed_methods)

    def _takes_calls(self, copy: LocalCopy, world: _World) -> bool:
        record = self._registry.models.get(copy.model_id)
        is_current = record is None or record.info == copy.info
        is_counted = copy.max_concurrency == world.limit
        return world.is_serving and copy.is_loaded and is_current and is_counted and self._monitor.serves(copy)

    def _names_of(self, model_id: str) -> Iterator[str]:
        """Yield the names that stand for the model now: those of vmodels, or else its id."""
        for name in self._registry.pointing_at(model_id) or (model_id,):
            try:
                if self._registry.resolve(name) == model_id:
                    yield name
            except NotFound:
                continue

    def _local_wait_s(self, model_id: str) -> float:
        model = self._monitor.model(model_id)
        if model is None:
            return 0.0
        return expected_wait_s(
            Candidate("", True, model.tier, 0.0, model.swap_in_s, model.running, model.waiting, 0, model.kv_usage)
        )

    def _peers(self, model_id: str, carrier: Carrier, pods: dict[str, InstanceRecord]) -> tuple[PeerCopy, ...]:
        record = self._registry.models.get(model_id)
        holders = record.instance_ids.keys() if record is not None else ()
        return tuple(
            copy
            for pod_id in sorted(holders)
            if pod_id in pods and (copy := self._peer(model_id, carrier, pod_id, pods[pod_id])) is not None
        )

    def _peer(self, model_id: str, carrier: Carrier, pod_id: str, pod: InstanceRecord) -> PeerCopy | None:
        report = pod.copies.get(model_id)
        address = pod.grpc_address if carrier is Carrier.GRPC else pod.http_address
        if report is None or report.state is not CopyState.LOADED or not address:
            return None
        secure = self._secure_address(address)
        if not _is_numeric(secure or address):
            return None
        candidate = Candidate(
            pod_id, False, report.tier, 0.0, report.swap_in_s, report.running, report.waiting, 0, pod.kv_usage
        )
        return PeerCopy(pod_id, secure or address, bool(secure), expected_wait_s(candidate))


def _is_numeric(address: str) -> bool:
    """Return whether an address needs no name to be resolved. Calls to pods with other addresses are the mesh's."""
    try:
        parsed = parse_address(address)
        return bool(parsed.path) or bool(ipaddress.ip_address(parsed.host))
    except (ConfigError, ValueError):
        return False
