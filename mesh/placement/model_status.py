"""Computes a model's state over all pods from its record, this pod's own copy and the other pods' records."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from common.model_state import CopyState, ModelState, Tier
from mesh.registry.records import InstanceRecord, ModelRecord
from mesh.types import CopyInfo, ModelStatus, StatusInfo

_UNLOADED = StatusInfo(ModelStatus.NOT_LOADED)


@dataclass(frozen=True, slots=True)
class LocalCopyState:
    """This pod's copy: placement's view of it, and the runtime's report if there is one."""

    state: CopyState
    started_ms: int
    size_bytes: int
    model: ModelState | None = None


def status_of(
    model_id: str,
    record: ModelRecord | None,
    *,
    own_id: str,
    own: LocalCopyState | None,
    own_model: ModelState | None,
    pods: Mapping[str, InstanceRecord],
) -> StatusInfo:
    """`own_model`: the runtime's report on the model, which may exist without a copy and say why the model failed."""
    if record is None:
        return StatusInfo(ModelStatus.NOT_FOUND)
    if own is None and not record.instance_ids and not record.failed_in:
        return _UNLOADED  # the common case, of thousands
    copies = [_own_info(model_id, own_id, own)] if own is not None else []
    copies += [_peer_info(model_id, pod, since_ms, pods[pod]) for pod, since_ms in _others(record, own_id, pods)]
    failures = sorted(((at_ms, pod) for pod, at_ms in record.failed_in.items()), reverse=True)
    errors = tuple(
        record.failures[pod].message if pod in record.failures else f"failed to load on {pod}" for _, pod in failures
    )
    failed = [
        _failed_info(pod, at_ms, record, own_id, own_model)
        for at_ms, pod in failures
        if not (pod == own_id and own is not None)
    ]
    states = [copy.status for copy in copies]
    if ModelStatus.LOADED in states:
        status = ModelStatus.LOADED
    elif ModelStatus.LOADING in states:
        status = ModelStatus.LOADING
    elif failed:
        status = ModelStatus.LOADING_FAILED
    else:
        status = ModelStatus.NOT_LOADED
    everything = tuple(sorted((*copies, *failed), key=lambda copy: copy.time_ms, reverse=True))
    return StatusInfo(status, errors, everything)


def _others(record: ModelRecord, own_id: str, pods: Mapping[str, InstanceRecord]) -> list[tuple[str, int]]:
    return [(pod, since_ms) for pod, since_ms in record.instance_ids.items() if pod != own_id and pod in pods]


def copy_state(model_id: str, state: CopyState, size_bytes: int, reported: ModelState | None) -> ModelState:
    """Return the state of this pod's copy: what its runtime reports, under the state that placement has given the copy.

    `size_bytes` is the booked size. It stands for the weights of a loaded copy if the runtime does not report them.
    """
    loaded = state is CopyState.LOADED
    known_bytes = size_bytes if loaded else 0
    if reported is None or state is CopyState.QUEUED:
        return ModelState(model_id=model_id, state=state, tier=Tier.UNKNOWN, weight_bytes=known_bytes)
    if state is CopyState.LOADING and reported.state in (CopyState.PULLING, CopyState.PACKING):
        state = reported.state
    return msgspec.structs.replace(
        reported,
        state=state,
        tier=reported.tier if loaded else Tier.UNKNOWN,
        progress=0.0 if loaded else reported.progress,
        progress_text="" if loaded else reported.progress_text,
        weight_bytes=reported.weight_bytes or known_bytes,
    )


def _own_info(model_id: str, own_id: str, own: LocalCopyState) -> CopyInfo:
    model = copy_state(model_id, own.state, own.size_bytes, own.model)
    return CopyInfo(own_id, _status(model.state), own.started_ms, model)


def _peer_info(model_id: str, pod: str, since_ms: int, instance: InstanceRecord) -> CopyInfo:
    if not instance.grpc_address and not instance.copies:
        # A Java pod: its record contains neither addresses nor the states of copies. A load that fails leaves the model's record.
        return CopyInfo(pod, ModelStatus.LOADED, since_ms)
    report = instance.copies.get(model_id)
    if report is None:
        # A load is announced in the model's record before the pod's own record shows it.
        return CopyInfo(pod, ModelStatus.LOADING, since_ms, ModelState(state=CopyState.QUEUED, tier=Tier.UNKNOWN))
    return CopyInfo(pod, _status(report.state), since_ms, msgspec.structs.replace(report, model_id=model_id))


def _failed_info(pod: str, at_ms: int, record: ModelRecord, own_id: str, own_model: ModelState | None) -> CopyInfo:
    state = CopyState.FAILED
    if pod == own_id and own_model is not None and own_model.state is CopyState.QUARANTINED:
        state = CopyState.QUARANTINED
    error = record.failures[pod].message if pod in record.failures else ""
    return CopyInfo(pod, ModelStatus.LOADING_FAILED, at_ms, ModelState(state=state, tier=Tier.UNKNOWN, error=error))


def _status(state: CopyState) -> ModelStatus:
    if state is CopyState.LOADED:
        return ModelStatus.LOADED
    if state in (CopyState.FAILED, CopyState.QUARANTINED):
        return ModelStatus.LOADING_FAILED
    return ModelStatus.NOT_LOADED if state is CopyState.UNLOADING else ModelStatus.LOADING
