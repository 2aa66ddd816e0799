"""Builds the ports beside the pod's main ones: ModelMesh's probes, its preStop hook, and a second port for metrics."""

import asyncio
from collections.abc import Callable

from mesh.api.routes.modelmesh_probes import ModelMeshProbes, PreStopHook
from mesh.api.self_signed import self_signed_context
from mesh.api.side_port import Handler, SidePort
from mesh.config.schema import MeshConfig
from mesh.registry.instances import Instances

_PRESTOP_GRACES = 2  # as in ModelMesh


def side_ports(
    config: MeshConfig,
    instances: Instances,
    *,
    instance_id: str,
    is_ready: Callable[[], bool],
    drained: asyncio.Event,
    metrics: Handler,
) -> tuple[SidePort, ...]:
    """Return the configured ports, not started. `drained` is set when the pod has let its last request end."""

    def is_peer_leaving() -> bool:
        return any(pod.shutting_down for pod_id, pod in instances.items() if pod_id != instance_id)

    ports = []
    if config.probe_listen:
        probes = ModelMeshProbes(is_ready, is_peer_leaving)
        ports.append(SidePort("probe", config.probe_listen, {"/ready": probes.ready, "/live": probes.live}))
    if config.prestop_listen:
        hook = PreStopHook(drained, _PRESTOP_GRACES * config.grace_s)
        ports.append(SidePort("preStop", config.prestop_listen, {"/prestop": hook.wait}))
    if config.metrics_listen:
        tls = self_signed_context(instance_id) if config.metrics_tls else None
        ports.append(SidePort("metrics", config.metrics_listen, {"/metrics": metrics}, tls))
    return tuple(ports)
