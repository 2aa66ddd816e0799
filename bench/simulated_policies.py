"""The two policies that bench.simulate compares: Repertory's own code, and the rules that ModelMesh's source states."""

import random
from dataclasses import replace

from bench.simulated_mesh import SimCopy, SimMesh, SimPod
from common.model_key import CopySettings
from common.model_state import CopyState, ModelState
from mesh.placement.copy_scaling import Change, CopyLoad, plan_copies
from mesh.placement.deferred_room import seconds_until_room
from mesh.placement.eviction import plan_eviction
from mesh.placement.heartbeat import load_interval_s
from mesh.placement.model_status import copy_state
from mesh.placement.plan import PodView, plan
from mesh.placement.usage import ModelUsage, Usage
from mesh.registry.pod_changes import change_between
from mesh.registry.records import InstanceRecord, ModelRecord, encode_record
from mesh.routing.copy_selection import Candidate, choose

_MODEL_BYTES = 8 << 30
_UNITS = _MODEL_BYTES // 8192
_THREADS = 4
_UNLOAD_S = 0.02
_KEY_BYTES = len("/mm/repertory/registry/") + 24


def _model_record_bytes(model: int, holders: dict[str, int]) -> int:
    record = ModelRecord(
        type="llm", key='{"quantize":"nf4"}', path=f"hf://org/model-{model}", instance_ids=holders, last_used_ms=1 << 40
    )
    return _KEY_BYTES + len(encode_record(record))


class RepertoryPolicy:
    """Calls `plan`, `plan_eviction`, `choose` and `plan_copies`, and encodes the records that pods publish."""

    def __init__(self, mesh: SimMesh) -> None:
        self._mesh = mesh
        self._views: dict[str, PodView] = {}
        self._values: dict[int, float] = {}  # decayed uses when a model was unloaded last: `use` of its record
        self._queued_since_s: dict[int, float] = {}
        self._queued: set[int] = set()
        self._published: dict[str, InstanceRecord] = {}
        self._published_s: dict[str, float] = {}  # the whole record

    def choose(self, copies: list[SimCopy], caller: SimPod, now_s: float) -> SimCopy:
        if len(copies) == 1:
            return copies[0]
        chosen = choose([self._candidate(copy, caller, now_s) for copy in copies])
        assert chosen is not None
        return next(copy for copy in copies if copy.pod.instance_id == chosen.instance_id)

    def place(self, model: int, caller: SimPod, avoid: set[str], now_s: float) -> SimPod | None:
        files = self._mesh.files.get(model, [])
        views = [
            replace(view, local=pod_id == caller.instance_id, has_files=pod_id in files)
            if pod_id == caller.instance_id or pod_id in files
            else view
            for pod_id in self._mesh.pods
            if pod_id not in avoid and (view := self._view(pod_id, now_s))
        ]
        for pod_id in plan(views, str(model), 1, load_s=self._mesh.shape.short_load_s):
            pod = self._mesh.pods[pod_id]
            num_loads = 1 + len(pod.copies) - pod.num_placed
            eviction = plan_eviction(self._usage(pod, now_s), str(model), num_loads)
            if eviction.victims or not (eviction.wait or eviction.never_fits):
                pod.uses.seed(str(model), self._values.get(model, 0.0))
                return pod
        return None

    def room_at_s(self, planned_s: float, begin_s: float, prepare_s: float) -> float:
        return begin_s + seconds_until_room(prepare_s, 0.0, _UNLOAD_S, is_prepared=False)

    def victims(self, copy: SimCopy, now_s: float) -> list[int]:
        eviction = plan_eviction(self._usage(copy.pod, now_s), str(copy.model), 1, spare_busy=False)
        return [int(victim) for victim in eviction.victims]

    def used(self, copy: SimCopy, caller: SimPod, now_s: float) -> None:
        copy.pod.uses.add(str(copy.model))
        if caller is not copy.pod:
            caller.uses.add(str(copy.model))
        if copy.queue_s(now_s) and copy.is_loaded(now_s):
            self._queued.add(copy.model)

    def unloaded(self, copy: SimCopy) -> None:
        self._values[copy.model] = copy.pod.uses.of(str(copy.model))

    def changed(self, pod: SimPod, now_s: float) -> int:
        self._views.pop(pod.instance_id, None)
        newest = next(reversed(pod.copies), None)
        of_model = 0 if newest is None else 2 * _model_record_bytes(newest, {pod.instance_id: 1 << 40})
        return of_model + self._publish(pod, now_s, whole=False)

    def loaded(self, pod: SimPod, now_s: float) -> int:
        self._views.pop(pod.instance_id, None)
        return self._publish(pod, now_s, whole=False)

    def tick(self, now_s: float) -> int:
        self._scale(now_s)
        interval_s = load_interval_s(len(self._mesh.pods))
        due = [
            pod for pod in self._mesh.pods.values() if now_s - self._published_s.get(pod.instance_id, 0.0) >= interval_s
        ]
        for pod in due:
            self._views.pop(pod.instance_id, None)
        return sum(self._publish(pod, now_s, whole=True) for pod in due)

    def _scale(self, now_s: float) -> None:
        self._queued_since_s = {model: self._queued_since_s.get(model, now_s) for model in self._queued}
        self._queued = set()
        for model, since_s in list(self._queued_since_s.items()):
            copies = self._mesh.holders.get(model, [])
            if not copies:
                continue
            load = CopyLoad(len(copies), len(self._mesh.pods), True, now_s - since_s, 0.0)
            if plan_copies(load, CopySettings()) is Change.ADD:
                self._queued_since_s.pop(model)
                self._mesh.load(model, copies[0].pod, {copy.pod.instance_id for copy in copies})

    def _candidate(self, copy: SimCopy, caller: SimPod, now_s: float) -> Candidate:
        return Candidate(
            copy.pod.instance_id,
            copy.pod is caller,
            loading_s=max(0.0, copy.loaded_s - now_s),
            running=copy.running(now_s),
            waiting=round(copy.queue_s(now_s) * len(copy.ends_s) / self._mesh.shape.service_s),
        )

    def _usage(self, pod: SimPod, now_s: float) -> Usage:
        return Usage(
            self._mesh.shape.places,
            tuple(
                ModelUsage(
                    str(model),
                    1,
                    round(copy.last_used_s * 1000),
                    copy.running(now_s),
                    is_loading=not copy.is_loaded(now_s),
                    use=pod.uses.of(str(model)),
                )
                for model, copy in pod.copies.items()
                if copy.has_place
            ),
        )

    def _view(self, pod_id: str, now_s: float) -> PodView:
        view = self._views.get(pod_id)
        if view is None:
            pod = self._mesh.pods[pod_id]
            usage = self._usage(pod, now_s)
            view = self._views[pod_id] = PodView(
                pod_id,
                False,
                self._mesh.shape.places,
                usage.free_bytes,
                victim_use=usage.victim_use,
                num_loading=pod.num_loading(now_s),
                loading_threads=_THREADS,
            )
        return view

    def _publish(self, pod: SimPod, now_s: float, *, whole: bool) -> int:
        record = InstanceRecord(
            start_time_ms=1 << 40,
            version=1_000_000,
            location=pod.instance_id,
            lru_time_ms=1 << 40,
            count=len(pod.copies),
            capacity_units=self._mesh.shape.places * _UNITS,
            used_units=len(pod.copies) * _UNITS,
            loading_threads=_THREADS,
            requests_per_min=pod.requests,
            grpc_address="10.0.0.1:8033",
            http_address="10.0.0.1:8080",
            victim_use=1.23,
            change_number=100,
            reads_changes=True,
            copies={f"model-{model}": _state(is_loaded=copy.is_loaded(now_s)) for model, copy in pod.copies.items()},
        )
        published = self._published.get(pod.instance_id)
        self._published[pod.instance_id] = record
        change = None if whole or published is None else change_between(published, record, 100)
        if change is None:
            self._published_s[pod.instance_id] = now_s
        return _KEY_BYTES + len(encode_record(record if change is None else change))


def _state(*, is_loaded: bool) -> ModelState:
    return copy_state("", CopyState.LOADED if is_loaded else CopyState.LOADING, _MODEL_BYTES, None)


class ModelMeshPolicy:
    """ModelMesh's published rules: placement by free space and age of the oldest entry, local LRU, copies by requests a minute, a churn guard."""

    guard_s = 2.0
    _SCALE_RPM = 2000
    _CHECK_S = 10.0

    def __init__(self, mesh: SimMesh) -> None:
        self._mesh = mesh
        self._rng = random.Random(1)
        self._lru: dict[str, float] = {}
        self._published: dict[str, tuple[float, int]] = {}

    def choose(self, copies: list[SimCopy], caller: SimPod, now_s: float) -> SimCopy:
        loaded = [copy for copy in copies if copy.is_loaded(now_s)]
        if not loaded:
            return min(copies, key=lambda copy: copy.loaded_s)
        return min(loaded, key=lambda copy: (copy.running(now_s), copy.last_used_s))

    def place(self, model: int, caller: SimPod, avoid: set[str], now_s: float) -> SimPod | None:
        places = self._mesh.shape.places
        pods = [pod for pod in self._mesh.pods.values() if pod.instance_id not in avoid]
        free = [pod for pod in pods if len(pod.copies) < places]
        if free:
            best = min(free, key=lambda pod: len(pod.copies))
            near = [pod for pod in free if len(pod.copies) < 10 or len(pod.copies) <= 1.25 * len(best.copies)]
        else:
            oldest_s = min(self._lru_of(pod) for pod in pods)
            near = [pod for pod in pods if self._lru_of(pod) - oldest_s <= max(45.0, (now_s - oldest_s) / 10)]
        pod = caller if caller in near else self._rng.choice(near)
        if len(pod.copies) < places:
            return pod
        is_churning = now_s - self._lru_of(pod) < self.guard_s
        return None if is_churning or not any(copy.is_loaded(now_s) for copy in pod.copies.values()) else pod

    def room_at_s(self, planned_s: float, begin_s: float, prepare_s: float) -> float:
        return planned_s

    def victims(self, copy: SimCopy, now_s: float) -> list[int]:
        loaded = [other for other in copy.pod.copies.values() if other.is_loaded(now_s)]
        return [min(loaded, key=lambda other: other.last_used_s).model] if loaded else []

    def used(self, copy: SimCopy, caller: SimPod, now_s: float) -> None:
        self._lru.pop(copy.pod.instance_id, None)

    def unloaded(self, copy: SimCopy) -> None:
        self._lru.pop(copy.pod.instance_id, None)

    def changed(self, pod: SimPod, now_s: float) -> int:
        self._lru.pop(pod.instance_id, None)
        newest = next(reversed(pod.copies), None)
        of_model = 0 if newest is None else 2 * _model_record_bytes(newest, {pod.instance_id: 1 << 40})
        before_s, count = self._published.get(pod.instance_id, (-1e9, -1))
        moved = abs(len(pod.copies) - count) >= max(1, 0.15 * count)
        if now_s - before_s < 2.0 or not (moved or now_s - before_s > 20.0):
            return of_model
        return of_model + self._publish(pod, now_s)

    def loaded(self, pod: SimPod, now_s: float) -> int:
        return 0  # other pods assume that a copy is loaded some time after its load began

    def tick(self, now_s: float) -> int:
        written = 0
        for pod in self._mesh.pods.values():
            before_s = self._published.get(pod.instance_id, (0.0, 0))[0]
            if now_s - before_s >= 20.0:  # the oldest entry has moved by as much
                written += self._publish(pod, now_s)
        if round(now_s) % self._CHECK_S == 0:
            self._scale()
        return written

    def _scale(self) -> None:
        for copies in list(self._mesh.holders.values()):
            rpm = sum(copy.uses_since_check for copy in copies) * 60 / self._CHECK_S
            for copy in copies:
                copy.uses_since_check = 0
            wanted = min(int(rpm / self._SCALE_RPM), len(self._mesh.pods) // 3)
            for _ in range(wanted - len(copies)):
                self._mesh.load(copies[0].model, copies[0].pod, {copy.pod.instance_id for copy in copies})

    def _lru_of(self, pod: SimPod) -> float:
        oldest_s = self._lru.get(pod.instance_id)
        if oldest_s is None:
            oldest_s = min((copy.last_used_s for copy in pod.copies.values()), default=-1e9)
            self._lru[pod.instance_id] = oldest_s
        return oldest_s

    def _publish(self, pod: SimPod, now_s: float) -> int:
        self._published[pod.instance_id] = now_s, len(pod.copies)
        record = InstanceRecord(
            start_time_ms=1 << 40,
            version=1 << 40,
            location=pod.instance_id,
            lru_time_ms=1 << 40,
            count=len(pod.copies),
            capacity_units=self._mesh.shape.places * _UNITS,
            used_units=len(pod.copies) * _UNITS,
            loading_threads=_THREADS,
            requests_per_min=pod.requests,
        )
        return _KEY_BYTES + len(encode_record(record))


class KnowingPolicy(RepertoryPolicy):
    """Knows how popular each model is, which no mesh does: evicts the least popular idle model of all pods. Others can only approach it."""

    def place(self, model: int, caller: SimPod, avoid: set[str], now_s: float) -> SimPod | None:
        pods = [pod for pod in self._mesh.pods.values() if pod.instance_id not in avoid]
        free = [pod for pod in pods if len(pod.copies) < self._mesh.shape.places]
        if free:
            return min(free, key=lambda pod: len(pod.copies))
        victims = [(self._unpopular(pod, now_s), pod) for pod in pods]
        best = max(
            (
                (models[len(pod.copies) - pod.num_placed], pod)
                for models, pod in victims
                if len(models) > len(pod.copies) - pod.num_placed
            ),
            key=lambda item: item[0],
            default=None,
        )
        return None if best is None else best[1]

    def victims(self, copy: SimCopy, now_s: float) -> list[int]:
        return self._unpopular(copy.pod, now_s)[:1]

    def _unpopular(self, pod: SimPod, now_s: float) -> list[int]:
        """Return the models that may be evicted, the least popular one first."""
        return sorted(
            (copy.model for copy in pod.copies.values() if copy.is_loaded(now_s) and not copy.running(now_s)),
            reverse=True,
        )
