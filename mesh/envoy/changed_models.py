"""Collects the models whose carried names may have changed, from the events of the registry, this pod's copies and the runtime's snapshots."""

from collections import Counter
from collections.abc import Set

from common.model_state import ModelState
from mesh.placement.copies import LocalCopies
from mesh.registry.records import InstanceRecord, ModelRecord, VModelRecord
from mesh.registry.registration import base_of
from mesh.registry.registry import Registry
from mesh.types import RuntimeSnapshot

# The addresses of any pod may be those that another pod's secure address is found by.
_ADDRESSES = ("grpc_address", "http_address", "peer_grpc_address", "peer_http_address")


class ChangedModels:
    """Listens from its construction on. Of thousands of models, a change concerns one or two."""

    def __init__(self, registry: Registry, copies: LocalCopies) -> None:
        self._registry = registry
        self._num_adapters: Counter[str] = Counter()  # by the name over which they are registered
        self._models: set[str] = set()
        self._are_all = False
        self._snapshot: dict[str, ModelState] = {}
        self._snapshot_of: RuntimeSnapshot | None = None
        self._before_snapshot: set[str] = set()  # taken since the last snapshot, which may say otherwise of them
        for model_id, record in registry.models.table.items():
            self._model_changed(model_id, None, record)
        registry.models.table.listen(self._model_changed)
        registry.vmodels.table.listen(self._vmodel_changed)
        registry.instances.listen(self._pod_changed)
        copies.listen(self._models.add)

    def has_adapters(self, name: str) -> bool:
        """Return whether LoRA adapters are registered over the name. A gRPC message may select one of them, which only the mesh reads."""
        return self._num_adapters[name] > 0

    def take(self, snapshot: RuntimeSnapshot) -> Set[str] | None:
        """Return the models with a change since the last call; None if any may have changed."""
        events, are_all = set(self._models), self._are_all
        self._models.clear()
        self._are_all = False
        found = events
        if snapshot is not self._snapshot_of:
            now = {model.model_id: model for model in snapshot.models}
            differing = {
                model_id
                for model_id in self._snapshot.keys() | now.keys()
                if self._snapshot.get(model_id) != now.get(model_id)
            }
            # A copy that was loaded after the last snapshot is judged by this one.
            found = events | differing | self._before_snapshot
            self._snapshot, self._snapshot_of, self._before_snapshot = now, snapshot, set()
        self._before_snapshot |= events
        return None if are_all else found

    def _model_changed(self, model_id: str, old: ModelRecord | None, new: ModelRecord | None) -> None:
        self._models.add(model_id)
        if old is None or new is None:
            # A vmodel leads to its target while its active model is not registered.
            for name in self._registry.pointing_at(model_id):
                self._vmodel_changed(name, self._registry.vmodels.get(name), None)
        base, base_before = (base_of(record.info) if record is not None else "" for record in (new, old))
        if base != base_before:
            self._num_adapters[base] += 1
            self._num_adapters[base_before] -= 1
            self._are_all = True

    def _vmodel_changed(self, name: str, old: VModelRecord | None, new: VModelRecord | None) -> None:
        self._models.add(name)
        for record in (old, new):
            if record is not None:
                self._models |= {record.active_id, record.target_id}

    def _pod_changed(self, pod_id: str, old: InstanceRecord | None, new: InstanceRecord | None) -> None:
        if old is None or new is None or any(getattr(old, name) != getattr(new, name) for name in _ADDRESSES):
            self._are_all = True
        elif pod_id == self._registry.instances.own_id:
            return
        elif old.kv_usage != new.kv_usage:
            self._models |= old.copies.keys() | new.copies.keys()
        else:
            self._models |= {
                model_id
                for model_id in old.copies.keys() | new.copies.keys()
                if old.copies.get(model_id) != new.copies.get(model_id)
            }
