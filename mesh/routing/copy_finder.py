"""Lists the copies that can take a request for a model: this pod's own and those of its peers."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from common.model_state import CopyState, Tier
from mesh.placement.copies import LocalCopies, LocalCopy
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.model_states import ModelStates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.records import InstanceRecord, ModelRecord
from mesh.registry.registry import Registry
from mesh.routing.copy_health import CopyHealth
from mesh.routing.copy_selection import Candidate, choose
from mesh.types import Target

_MIN_LOADING_S = 0.1
_MAX_KNOWN = 4096


@dataclass(frozen=True, slots=True)
class _KnownTarget:
    """The target of a copy, which stays the same while the copy and the model's record do."""

    copy: LocalCopy
    record: ModelRecord | None
    target: Target | None


class CopyFinder:
    """`local`: the target that stands for this pod's own runtime. `all_ejected` is called when only ejected copies exist, with their pods."""

    def __init__(
        self,
        registry: Registry,
        states: ModelStates,
        monitor: RuntimeMonitor,
        copies: LocalCopies,
        health: CopyHealth,
        learned: LearnedCopies,
        local: Target,
        all_ejected: Callable[[str, frozenset[str]], None],
    ) -> None:
        self._registry = registry
        self._states = states
        self._monitor = monitor
        self._copies = copies
        self._health = health
        self._learned = learned
        self._local = local
        self._all_ejected = all_ejected
        self._peer_requests: Counter[tuple[str, str]] = Counter()
        # Loads, by model and pod, whose pods answered that they do not have the model.
        self._lost: dict[tuple[str, str], int] = {}
        self._local_targets: dict[str, _KnownTarget] = {}

    def find(self, model_id: str, *, prefix_hash: str, exclude: frozenset[str], local_only: bool) -> Target | None:
        """Return the copy with the least expected wait; None if no copy can take the request now."""
        copy = self._copies.get(model_id)
        own_id = self._local.instance_id
        record = self._registry.models.get(model_id)
        local = None
        if copy is not None and copy.is_loaded and own_id not in exclude and self._monitor.serves(copy):
            local = self._local_target(copy, record)
        if record is not None and not local_only:
            record = self._learned.applied_to(model_id, record)
        if local_only or record is None or len(record.instance_ids) <= (own_id in record.instance_ids):
            # There is no other copy to compare this pod's with.
            if local is not None:
                self._note_chosen(model_id, own_id, (own_id,), local_only)
            return local
        candidates = [] if local is None else [self._local_candidate(model_id)]
        pods = self._learned.without_old_reports(model_id, self._states.pods())
        candidates += self._peer_candidates(model_id, record, pods, exclude)
        chosen = choose(candidates if len(candidates) < 2 else self._judged(model_id, candidates), prefix_hash)
        if chosen is None:
            return None
        pod_ids = tuple(candidate.instance_id for candidate in candidates)
        self._note_chosen(model_id, chosen.instance_id, pod_ids, local_only)
        if chosen.local:
            return local
        pod = pods[chosen.instance_id]
        return Target(chosen.instance_id, False, pod.grpc_address, pod.http_address, is_loaded=not chosen.loading_s)

    def begin_at_peer(self, model_id: str, instance_id: str) -> None:
        self._peer_requests[model_id, instance_id] += 1

    def end_at_peer(self, model_id: str, instance_id: str) -> None:
        self._peer_requests[model_id, instance_id] -= 1
        if not self._peer_requests[model_id, instance_id]:
            del self._peer_requests[model_id, instance_id]

    def mark_lost(self, model_id: str, instance_id: str) -> None:
        """Skip a peer for this model until it loads the model again, because it answered that it does not have it."""
        record = self._registry.models.get(model_id)
        self._learned.lost(model_id, instance_id, record.instance_ids.get(instance_id, 0) if record is not None else 0)
        if record is not None and instance_id in record.instance_ids:
            self._lost[model_id, instance_id] = record.instance_ids[instance_id]

    def _judged(self, model_id: str, candidates: list[Candidate]) -> list[Candidate]:
        """Return the candidates with what this pod's own requests showed of them."""
        now_s = time.monotonic()
        best_s = self._health.best_s(model_id, (candidate.instance_id for candidate in candidates))
        records = [self._health.of(model_id, candidate.instance_id) for candidate in candidates]
        return [
            replace(
                candidate,
                excess_s=record.excess_s(best_s, now_s),
                is_ejected=self._health.is_ejected(model_id, candidate.instance_id, now_s),
            )
            for candidate, record in zip(candidates, records, strict=True)
        ]

    def _note_chosen(self, model_id: str, chosen_id: str, pod_ids: tuple[str, ...], local_only: bool) -> None:
        if self._health.is_clean:
            return
        if not local_only and self._health.is_ejected(model_id, chosen_id, time.monotonic()):
            self._all_ejected(model_id, frozenset(pod_ids))
        self._health.chosen(model_id, chosen_id)

    def _local_target(self, copy: LocalCopy, record: ModelRecord | None) -> Target | None:
        """Return the target of this pod's copy; None for a copy of an earlier registration of the same id, which has other files."""
        known = self._local_targets.get(copy.model_id)
        if known is None or known.copy is not copy or known.record is not record:
            known = self._local_targets[copy.model_id] = self._known_target(copy, record)
        return known.target

    def _known_target(self, copy: LocalCopy, record: ModelRecord | None) -> _KnownTarget:
        if len(self._local_targets) >= _MAX_KNOWN:
            self._local_targets.clear()
        if record is not None and record.info != copy.info:
            return _KnownTarget(copy, record, None)
        local = self._local
        target = Target(local.instance_id, True, local.grpc_address, local.http_address, copy.started_ms)
        return _KnownTarget(copy, record, target)

    def _local_candidate(self, model_id: str) -> Candidate:
        model = self._monitor.model(model_id)
        in_flight = self._copies.in_flight(model_id)
        if model is None:
            return Candidate(self._local.instance_id, True, in_flight=in_flight)
        return Candidate(
            self._local.instance_id,
            True,
            tier=model.tier,
            swap_in_s=model.swap_in_s,
            running=model.running,
            waiting=model.waiting,
            in_flight=in_flight,
            kv_usage=model.kv_usage,
        )

    def _peer_candidates(
        self, model_id: str, record: ModelRecord, pods: Mapping[str, InstanceRecord], exclude: frozenset[str]
    ) -> list[Candidate]:
        return [
            self._peer_candidate(model_id, pod_id, pods[pod_id])
            for pod_id, since_ms in record.instance_ids.items()
            if pod_id in pods
            and pod_id != self._local.instance_id
            and pod_id not in exclude
            and not self._is_lost(model_id, pod_id, since_ms)
            and _takes_requests(pods[pod_id], model_id)
        ]

    def _is_lost(self, model_id: str, pod_id: str, since_ms: int) -> bool:
        lost_ms = self._lost.get((model_id, pod_id))
        if lost_ms is not None and lost_ms != since_ms:
            del self._lost[model_id, pod_id]
        return lost_ms == since_ms

    def _peer_candidate(self, model_id: str, pod_id: str, pod: InstanceRecord) -> Candidate:
        """Describe a peer's copy. One that is still loading counts too: its pod holds the request until it is loaded."""
        in_flight = self._peer_requests[model_id, pod_id]
        report = pod.copies.get(model_id)
        loading_s = 0.0
        if report is None or report.state is not CopyState.LOADED:
            elapsed_s = self._states.loading_for_s(model_id, pod_id)
            loading_s = max(_MIN_LOADING_S, self._states.expected_load_s(model_id) - elapsed_s)
        if report is None:
            return Candidate(pod_id, False, loading_s=loading_s, in_flight=in_flight, kv_usage=pod.kv_usage)
        return Candidate(
            pod_id,
            False,
            tier=Tier.DEVICE if loading_s else report.tier,
            loading_s=loading_s,
            swap_in_s=report.swap_in_s,
            running=report.running,
            waiting=report.waiting,
            in_flight=in_flight,
            kv_usage=pod.kv_usage,
        )


def _takes_requests(pod: InstanceRecord, model_id: str) -> bool:
    report = pod.copies.get(model_id)
    return bool(pod.grpc_address) and (report is None or report.state is not CopyState.UNLOADING)
