"""A model's state over all pods, put together from its record, this pod's own copy and what the other pods tell. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.registry.records import InstanceRecord, ModelRecord
from mesh.types import CopyInfo, CopyState, ModelStatus, RuntimeModel, StatusInfo

MAX_FAILURES = 3  # ModelMesh: so many pods have tried
FAILURES_FOR_MS = 450_000  # ... within 7.5 minutes
_SKEW_MS = 5_000
_AT_REST = StatusInfo(ModelStatus.NOT_LOADED)


@dataclass(frozen=True, slots=True)
class OwnCopy:
    """This pod's copy: its books, and the runtime's account of it if there is one."""

    state: CopyState
    started_ms: int
    size_bytes: int
    model: RuntimeModel | None = None


def status_of(
    model_id: str,
    record: ModelRecord | None,
    *,
    own_id: str,
    own: OwnCopy | None,
    own_model: RuntimeModel | None,
    pods: Mapping[str, InstanceRecord],
) -> StatusInfo:
    """`own_model`: what the runtime says of the model even if this pod holds no copy (it may remember why it failed)."""
    if record is None:
        return StatusInfo(ModelStatus.NOT_FOUND)
    if own is None and not record.instance_ids and not record.failed_in:
        return _AT_REST  # as most are, of thousands
    copies = [_own_info(own_id, own)] if own is not None else []
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
    elif ModelStatus.UNKNOWN in states:
        status = ModelStatus.UNKNOWN
    else:
        status = ModelStatus.NOT_LOADED
    everything = tuple(sorted((*copies, *failed), key=lambda copy: copy.time_ms, reverse=True))
    return StatusInfo(status, errors, everything)


def blocked_for_s(
    record: ModelRecord,
    *,
    own_id: str,
    pods: Mapping[str, InstanceRecord],
    now_ms: int,
    expiry_s: float,
    quarantined: bool = False,
) -> float:
    """How long no pod should try to load this model again; 0 = it may be tried (somewhere: see `may_load`).

    `quarantined`: this pod's runtime won't have it until somebody asks for it by name.
    """
    recent = sorted(at_ms for at_ms in record.failed_in.values() if _age_ms(at_ms, now_ms) < FAILURES_FOR_MS)
    if len(recent) >= MAX_FAILURES:
        return (recent[-MAX_FAILURES] + FAILURES_FOR_MS - now_ms) / 1000
    candidates = {own_id, *pods} - ({own_id} if quarantined else set())
    waits_s = [
        max(0.0, expiry_s - _age_ms(record.failed_in[pod], now_ms) / 1000) if pod in record.failed_in else 0.0
        for pod in candidates
    ]
    return min(waits_s, default=expiry_s)


def may_load(record: ModelRecord, instance_id: str, *, now_ms: int, expiry_s: float) -> bool:
    at_ms = record.failed_in.get(instance_id)
    return at_ms is None or _age_ms(at_ms, now_ms) >= expiry_s * 1000


def _age_ms(at_ms: int, now_ms: int) -> float:
    """What lies further ahead than clocks differ was written before a clock was set back: nobody is to wait until it is reached again."""
    return now_ms - at_ms if at_ms - now_ms <= _SKEW_MS else float("inf")


def _others(record: ModelRecord, own_id: str, pods: Mapping[str, InstanceRecord]) -> list[tuple[str, int]]:
    return [(pod, since_ms) for pod, since_ms in record.instance_ids.items() if pod != own_id and pod in pods]


def _own_info(own_id: str, own: OwnCopy) -> CopyInfo:
    model = own.model
    state = own.state
    if (
        model is not None
        and own.state is CopyState.LOADING
        and model.state in (CopyState.PULLING, CopyState.PACKING, CopyState.LOADING)
    ):
        state = model.state
    if model is None or state is CopyState.QUEUED:
        # bytes that are only predicted are not shown as its weight
        known_bytes = own.size_bytes if state is CopyState.LOADED else 0
        return CopyInfo(own_id, _status(state), own.started_ms, state=state, weight_bytes=known_bytes)
    return CopyInfo(
        own_id,
        _status(state),
        own.started_ms,
        state=state,
        tier=model.tier if state is CopyState.LOADED else None,
        error=model.error,
        progress=0.0 if state is CopyState.LOADED else model.progress,
        progress_text="" if state is CopyState.LOADED else model.progress_text,
        weight_bytes=model.weight_bytes or (own.size_bytes if state is CopyState.LOADED else 0),
        device_bytes=model.device_bytes,
        running=model.running,
        waiting=model.waiting,
        swap_in_s=model.swap_in_s,
        tokens_per_s=model.tokens_per_s,
        quantization=model.quantization,
        max_model_len=model.max_model_len,
    )


def _peer_info(model_id: str, pod: str, since_ms: int, instance: InstanceRecord) -> CopyInfo:
    if not instance.grpc_address and not instance.copies:
        # not one of ours: its record says neither how to reach it nor whether the load has ended
        return CopyInfo(pod, ModelStatus.UNKNOWN, since_ms)
    report = instance.copies.get(model_id)
    if report is None:
        # the load is announced before the pod's own record tells of it
        return CopyInfo(pod, ModelStatus.LOADING, since_ms, state=CopyState.QUEUED)
    return CopyInfo(
        pod,
        _status(report.state),
        since_ms,
        state=report.state,
        tier=report.tier if report.state is CopyState.LOADED else None,
        weight_bytes=report.weight_bytes,
        running=report.running,
        waiting=report.waiting,
        swap_in_s=report.swap_in_s,
        tokens_per_s=report.tokens_per_s,
    )


def _failed_info(pod: str, at_ms: int, record: ModelRecord, own_id: str, own_model: RuntimeModel | None) -> CopyInfo:
    state = CopyState.FAILED
    if pod == own_id and own_model is not None and own_model.state is CopyState.QUARANTINED:
        state = CopyState.QUARANTINED
    error = record.failures[pod].message if pod in record.failures else ""
    return CopyInfo(pod, ModelStatus.LOADING_FAILED, at_ms, state=state, error=error)


def _status(state: CopyState) -> ModelStatus:
    if state is CopyState.LOADED:
        return ModelStatus.LOADED
    if state in (CopyState.FAILED, CopyState.QUARANTINED):
        return ModelStatus.LOADING_FAILED
    return ModelStatus.NOT_LOADED if state is CopyState.UNLOADING else ModelStatus.LOADING
