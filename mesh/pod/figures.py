"""Collects the figures that a pod's metrics show at a scrape."""

from common.clock import epoch_ms
from mesh.observability.modelmesh_metrics import PodFigures
from mesh.placement.copies import LocalCopies
from mesh.registry.registry import Registry


def figures_of(copies: LocalCopies, registry: Registry) -> PodFigures:
    usage = copies.usage()
    records = [record for _, record in registry.models.placed()]
    return PodFigures(
        capacity_bytes=usage.capacity_bytes,
        used_bytes=usage.used_bytes,
        num_models=len(usage.models),
        lru_ms=usage.lru_ms,
        now_ms=epoch_ms(),
        models_managed=len(registry.models.table),
        models_loaded=sum(1 for record in records if record.instance_ids),
        models_failed=sum(1 for record in records if record.failed_in),
        is_leader=registry.instances.is_leader(),
    )
