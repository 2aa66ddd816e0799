"""Builds the list of names whose calls another process than the mesh may carry, for Envoy and for workers."""

from collections.abc import Callable

from mesh.config.schema import MeshConfig
from mesh.envoy.plan import Carrier
from mesh.envoy.view import CarriedNames
from mesh.pod.placement_parts import PlacementParts, PodBase


def carried_names(
    base: PodBase, parts: PlacementParts, *, secure_address: Callable[[str], str], carries_limited: bool
) -> CarriedNames:
    """Return the names of a pod. `secure_address`, `carries_limited`: as in CarriedNames."""
    return CarriedNames(
        base.registry,
        parts.states,
        parts.monitor,
        parts.copies,
        secure_address=secure_address,
        is_cut_off=lambda: parts.contact.is_cut_off,
        is_doubted=lambda: parts.silence.is_doubted,
        carriers=_carriers(base.config),
        carries_limited=carries_limited,
    )


def runtime_addresses(config: MeshConfig) -> dict[Carrier, str]:
    """Return where the runtime answers inference."""
    return {Carrier.GRPC: config.runtime_inference_grpc or config.runtime_grpc, Carrier.HTTP: config.runtime_http}


def _carriers(config: MeshConfig) -> frozenset[Carrier]:
    """Return the carriers whose calls may pass unread: a dataplane configuration reads the model from messages."""
    grpc = {Carrier.GRPC} if not config.dataplane_config else set()
    return frozenset(grpc | ({Carrier.HTTP} if config.runtime_http else set()))
