"""Builds the parts of a pod that hold and place models: copies, loads, the runtime's monitor, placement and their reconciler."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from common.changes import Changes
from common.model_key import CopySettings
from mesh.access.access import Access
from mesh.client.connections import Connections
from mesh.client.peer_loads import HttpPeerLoads
from mesh.client.peer_probes import HttpPeerProbes
from mesh.client.runtime import GrpcRuntime
from mesh.config.schema import MeshConfig
from mesh.observability.metrics import Metrics
from mesh.placement.copies import LocalCopies
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.loads import LocalLoads
from mesh.placement.model_states import ModelStates
from mesh.placement.placement import Placement
from mesh.placement.reconciler import Reconciler
from mesh.placement.record_updates import RecordUpdates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.placement.type_constraints import TypeConstraints
from mesh.registry.records import InstanceRecord
from mesh.registry.registry import Registry
from mesh.registry.store_contact import StoreContact
from mesh.routing.carried_answers import CarriedAnswers
from mesh.routing.in_flight import InFlight
from mesh.routing.peer_health import PeerHealth
from mesh.routing.runtime_silence import RuntimeSilence
from mesh.store.protocol import Store


@dataclass(frozen=True, slots=True)
class PodBase:
    """What all parts of a pod are built from."""

    config: MeshConfig
    instance_id: str
    store: Store
    registry: Registry
    access: Access
    metrics: Metrics
    connections: Connections
    changes: Changes


@dataclass(frozen=True, slots=True)
class PlacementParts:
    """The parts that hold and place models, and the contact with the store, the runtime and the peers that they depend on."""

    runtime: GrpcRuntime
    contact: StoreContact
    in_flight: InFlight
    peer_health: PeerHealth
    carried: CarriedAnswers
    silence: RuntimeSilence
    copies: LocalCopies
    learned: LearnedCopies
    loads: LocalLoads
    monitor: RuntimeMonitor
    states: ModelStates
    placement: Placement
    reconciler: Reconciler


def pod_base(config: MeshConfig, instance_id: str, store: Store, registry: Registry, access: Access) -> PodBase:
    connections = Connections(
        max_message_bytes=config.grpc_max_message_bytes,
        tls=access.peer_tls,
        peer_name=access.peer_name,
        secure_address=registry.instances.secure_address,
    )

    def forget_gone(_: str, old: InstanceRecord | None, new: InstanceRecord | None) -> None:
        for address in registry.instances.gone_addresses(old, new):
            connections.forget(address)

    registry.instances.listen(forget_gone)
    return PodBase(config, instance_id, store, registry, access, Metrics(), connections, Changes())


def build_placement(
    base: PodBase, publish_record: Callable[[], Awaitable[None]], withdraw: Callable[[str], Awaitable[None]]
) -> PlacementParts:
    """Build the parts, not started. `publish_record` writes this pod's record to the registry. `withdraw`: as in LocalUnloads."""
    config, registry, changes = base.config, base.registry, base.changes

    def copy_settings_of(model_id: str) -> CopySettings:
        record = registry.models.get(model_id)
        return record.copy_settings if record is not None else CopySettings()

    copies = LocalCopies(changes, copy_settings_of)
    probes = HttpPeerProbes(base.connections)
    contact = StoreContact(base.store, registry.instances, probes, changes, ttl_s=config.session_ttl_s)
    in_flight = InFlight()

    def http_address_of(instance_id: str) -> str | None:
        """Return the address to probe a pod at; None without a record, empty while the pod shuts down and answers what it has begun."""
        record = registry.instances.get(instance_id)
        if record is None:
            return None
        return "" if record.shutting_down else record.http_address

    def runtime_lost() -> None:
        """Have requests answered elsewhere that wait for this pod's runtime, which does not answer."""
        in_flight.lose(base.instance_id, committed=False)

    def is_idle(model_id: str) -> bool:
        """Return whether a model is loaded and the runtime's last state has no request of it, and none waits for it here."""
        copy, model = copies.get(model_id), monitor.model(model_id)
        is_busy = model is not None and bool(model.running or model.waiting)
        return copy is not None and copy.is_loaded and not is_busy and not copies.num_waiting(model_id)

    peer_health = PeerHealth(probes, in_flight, changes, address_of=http_address_of, gone_after_s=config.session_ttl_s)
    runtime = GrpcRuntime(base.connections.grpc(config.runtime_grpc))
    carried = CarriedAnswers()
    silence = RuntimeSilence(
        base.instance_id,
        in_flight,
        changes,
        look=runtime.look,
        is_foreign=lambda: monitor.snapshot.foreign,
        carried=carried,
        is_idle=is_idle,
    )

    def is_store_away() -> bool:
        """Return whether records cannot be changed, so that other pods would not see a load."""
        return not base.store.is_answering or bool(registry.num_lost)

    learned = LearnedCopies(is_store_away)
    record_updates = RecordUpdates(registry.models, base.instance_id, learned)
    loads = LocalLoads(
        runtime,
        record_updates,
        copies,
        changes,
        base.metrics,
        load_timeout_s=config.load_timeout_s,
        grace_s=config.grace_s,
        publish=publish_record,
        base_of=registry.base_of,
        busy_s=lambda model_id: monitor.busy_s(model_id),
        others=lambda: states.others(),
        reported=lambda: monitor.snapshot.models,
        reports_states=lambda: not monitor.snapshot.foreign,
        withdraw=withdraw,
    )
    monitor = RuntimeMonitor(
        runtime,
        copies,
        loads,
        changes,
        first_ready=lambda: reconciler.first_ready(),
        changed=lambda snapshot: reconciler.runtime_changed(snapshot),
        lost=runtime_lost,
        is_mute=lambda: silence.is_mute,
    )
    states = ModelStates(
        registry,
        copies,
        loads,
        monitor,
        learned,
        failure_expiry_s=config.failure_expiry_s,
        is_usable=peer_health.is_usable,
    )
    placement = Placement(
        registry,
        runtime,
        record_updates,
        copies,
        loads,
        HttpPeerLoads(base.connections, base.access.peers),
        states,
        learned,
        monitor,
        changes,
        constraints=TypeConstraints(config.type_constraints),
        own_labels=config.labels,
        unreachable=peer_health.suspect,
    )
    reconciler = Reconciler(registry, record_updates, copies, loads, placement, states, monitor, changes)
    return PlacementParts(
        runtime,
        contact,
        in_flight,
        peer_health,
        carried,
        silence,
        copies,
        learned,
        loads,
        monitor,
        states,
        placement,
        reconciler,
    )
