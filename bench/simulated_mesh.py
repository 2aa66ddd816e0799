"""A mesh on a virtual clock: pods with places for models, copies that serve and queue, loads, failures, and the records that would be written.

What is decided, where a model is loaded, what is evicted for it, which copy serves and how many there are, is left to a Policy.
"""

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from common.decayed_uses import DecayedUses
from mesh.placement.usage import HALF_LIFE_USES

_THREADS = 4
_RECHECK_S = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of the mesh and its work. Times in seconds. A copy serves `concurrency` requests at once.

    A load prepares files for `prepare_s`, and `pull_s` more on a pod that is not among the last four that loaded the model, and then reads them into
    memory for `load_s`. `is_filled`: begin with the most popular models loaded.
    """

    num_pods: int = 1000
    places: int = 20
    num_models: int = 1_000_000
    exponent: float = 1.1
    rate: float = 2000.0
    prepare_s: float = 0.0
    load_s: float = 5.0
    pull_s: float = 2.5
    service_s: float = 0.1
    concurrency: int = 16
    warmup_s: float = 40.0
    seconds: float = 60.0
    failure_every_s: float = 2.0
    slo_s: float = 10.0
    is_filled: bool = True
    seed: int = 0

    @property
    def short_load_s(self) -> float:
        """The duration of a load of files that the pod has."""
        return self.prepare_s + self.load_s


@dataclass(eq=False, slots=True)
class SimCopy:
    """`ends_s`: when each of the copy's slots is free. `has_place` False: it is loading, and no other model was evicted for it yet."""

    model: int
    pod: "SimPod"
    loaded_s: float
    ends_s: list[float]
    last_used_s: float = 0.0
    uses_since_check: int = 0
    has_place: bool = True

    def is_loaded(self, now_s: float) -> bool:
        return self.loaded_s <= now_s

    def running(self, now_s: float) -> int:
        return sum(end_s > now_s for end_s in self.ends_s)

    def queue_s(self, now_s: float) -> float:
        """Return how long a request that arrives now waits for a slot."""
        return max(0.0, self.ends_s[0] - now_s)


@dataclass(eq=False, slots=True)
class SimPod:
    instance_id: str
    copies: dict[int, SimCopy] = field(default_factory=dict)
    uses: DecayedUses = field(default_factory=lambda: DecayedUses(HALF_LIFE_USES))
    threads_s: list[float] = field(default_factory=lambda: [0.0] * _THREADS)
    requests: int = 0

    @property
    def num_placed(self) -> int:
        return sum(copy.has_place for copy in self.copies.values())

    def num_loading(self, now_s: float) -> int:
        return sum(not copy.is_loaded(now_s) for copy in self.copies.values())


@dataclass(slots=True)
class Figures:
    """Counts of the measured part. `moves`: loads, within a minute, of models that a lost pod had held."""

    requests: int = 0
    hits: int = 0
    refused: int = 0
    loads: int = 0
    failures: int = 0
    moves: int = 0
    record_bytes: int = 0
    waits_s: list[float] = field(default_factory=list)

    def tail(self, slo_s: float) -> list[tuple[float, float]]:
        """Return the share of requests, in percent, that waited longer than each number of seconds. A refused request counts as one that waits forever."""
        total = max(1, self.requests)
        points = [slo_s * step / 20 for step in range(41)]
        return [
            (limit_s, 100 * (self.refused + sum(wait_s > limit_s for wait_s in self.waits_s)) / total)
            for limit_s in points
        ]


class Policy(Protocol):
    """Decides for all pods. Each method sees the whole mesh; what a pod would not know it must not use."""

    def choose(self, copies: list[SimCopy], caller: SimPod, now_s: float) -> SimCopy: ...

    def place(self, model: int, caller: SimPod, avoid: set[str], now_s: float) -> SimPod | None:
        """Return the pod to load on; None to refuse the request."""

    def room_at_s(self, planned_s: float, begin_s: float, prepare_s: float) -> float:
        """Return when another model is evicted for a load that was planned, began and prepares files for so long."""

    def victims(self, copy: SimCopy, now_s: float) -> list[int]:
        """Return the models to evict for a load on a full pod; none if all are loading."""

    def used(self, copy: SimCopy, caller: SimPod, now_s: float) -> None: ...

    def unloaded(self, copy: SimCopy) -> None: ...

    def changed(self, pod: SimPod, now_s: float) -> int:
        """Note that a pod's copies have changed, and return the bytes of the records that it writes."""

    def loaded(self, pod: SimPod, now_s: float) -> int:
        """Note that a load has ended, and return the bytes of the records that the pod writes."""

    def tick(self, now_s: float) -> int:
        """Do what happens every second, and return the bytes of the records that are written."""


class SimMesh:
    """Runs the requests of a Shape under one policy. `Policy` is made for the mesh, since it needs its pods."""

    def __init__(self, shape: Shape, policy_for: "Callable[[SimMesh], Policy]") -> None:
        self.shape = shape
        self.pods = {f"pod{number}": SimPod(f"pod{number}") for number in range(shape.num_pods)}
        self.holders: dict[int, list[SimCopy]] = {}
        self.files: dict[int, list[str]] = {}  # the last pods that loaded a model
        self.figures = Figures()
        self.now_s = 0.0
        self._rng = random.Random(shape.seed)
        self._lost: dict[int, float] = {}
        self._ends: list[tuple[float, str]] = []  # of loads
        self._rooms: list[tuple[float, int, SimCopy]] = []  # loads for which a model will be evicted
        self._next_pod = shape.num_pods
        self._policy = policy_for(self)
        if shape.is_filled:
            self._fill()

    def run(self, models: Iterator[int]) -> Figures:
        """Send `rate` requests a second for the warm-up and the measured time, each to a random pod."""
        shape = self.shape
        tick_s, failure_s = 1.0, shape.warmup_s + shape.failure_every_s / 2
        for number in range(round(shape.rate * (shape.warmup_s + shape.seconds))):
            self.now_s = number / shape.rate
            if self.is_measured and not self.figures.requests:
                self.figures = Figures()  # forget the warm-up
            self._make_room()
            while self._ends and self._ends[0][0] <= self.now_s:
                end_s, pod_id = heapq.heappop(self._ends)
                if pod_id in self.pods:
                    self.figures.record_bytes += self._policy.loaded(self.pods[pod_id], end_s)
            while self.now_s >= tick_s:
                self.figures.record_bytes += self._policy.tick(tick_s)
                tick_s += 1.0
            if self.now_s >= failure_s:
                self._replace_one()
                failure_s += shape.failure_every_s
            self._request(next(models))
        return self.figures

    @property
    def is_measured(self) -> bool:
        return self.now_s >= self.shape.warmup_s

    def load(self, model: int, caller: SimPod, avoid: set[str]) -> SimCopy | None:
        """Load a copy where the policy says. None if it refuses."""
        pod = self._policy.place(model, caller, avoid, self.now_s)
        if pod is None:
            return None
        files = self.files.get(model, [])
        prepare_s = self.shape.prepare_s + (0.0 if pod.instance_id in files else self.shape.pull_s)
        begin_s = max(self.now_s, pod.threads_s[0])
        end_s = begin_s + prepare_s + self.shape.load_s
        heapq.heapreplace(pod.threads_s, end_s)
        heapq.heappush(self._ends, (end_s, pod.instance_id))
        is_full = pod.num_placed >= self.shape.places
        copy = self._add(model, pod, end_s)
        if is_full:
            copy.has_place = False
            room_s = self._policy.room_at_s(self.now_s, begin_s, prepare_s)
            heapq.heappush(self._rooms, (room_s, self.figures.loads, copy))
            self._make_room()
        self.files[model] = [pod.instance_id, *(other for other in files if other != pod.instance_id)][:4]
        self.figures.loads += 1
        if self.now_s - self._lost.pop(model, -1e9) <= 60.0:
            self.figures.moves += 1
        self.figures.record_bytes += self._policy.changed(pod, self.now_s)
        return copy

    def _make_room(self) -> None:
        """Evict for the loads that need their places by now. A load whose pod has no victim waits for one."""
        while self._rooms and self._rooms[0][0] <= self.now_s:
            room_s, number, copy = heapq.heappop(self._rooms)
            if copy.pod.instance_id not in self.pods:
                continue
            victims = self._policy.victims(copy, room_s)
            for victim in victims:
                self.unload(copy.pod.copies[victim])
            copy.has_place = copy.pod.num_placed < self.shape.places
            if not copy.has_place:
                copy.loaded_s += _RECHECK_S
                copy.ends_s = [end_s + _RECHECK_S for end_s in copy.ends_s]
                heapq.heappush(self._rooms, (room_s + _RECHECK_S, number, copy))

    def unload(self, copy: SimCopy) -> None:
        self._policy.unloaded(copy)
        self._forget(copy)

    def _request(self, model: int) -> None:
        caller = self._random_pod()
        caller.requests += 1
        copies = self.holders.get(model)
        copy = self._policy.choose(copies, caller, self.now_s) if copies else self.load(model, caller, set())
        if self.is_measured:
            self.figures.requests += 1
        if copy is None:
            self.figures.refused += self.is_measured
            return
        is_hit = copy.is_loaded(self.now_s)
        begin_s = max(self.now_s, copy.loaded_s, copy.ends_s[0])
        heapq.heapreplace(copy.ends_s, begin_s + self.shape.service_s)
        copy.last_used_s = self.now_s
        copy.uses_since_check += 1
        self._policy.used(copy, caller, self.now_s)
        if self.is_measured:
            self.figures.hits += is_hit
            self.figures.waits_s.append(begin_s - self.now_s)

    def _random_pod(self) -> SimPod:
        while True:
            pod = self.pods.get(f"pod{self._rng.randrange(self._next_pod)}")
            if pod is not None:
                return pod

    def _add(self, model: int, pod: SimPod, loaded_s: float) -> SimCopy:
        copy = SimCopy(model, pod, loaded_s, [loaded_s] * self.shape.concurrency, last_used_s=self.now_s)
        pod.copies[model] = copy
        self.holders.setdefault(model, []).append(copy)
        return copy

    def _forget(self, copy: SimCopy) -> None:
        del copy.pod.copies[copy.model]
        copies = self.holders[copy.model]
        copies.remove(copy)
        if not copies:
            del self.holders[copy.model]

    def _fill(self) -> None:
        """Load the most popular models, spread at random."""
        places = [pod for pod in self.pods.values() for _ in range(self.shape.places)]
        self._rng.shuffle(places)
        for model, pod in enumerate(places[: self.shape.num_models]):
            self._add(model, pod, 0.0)

    def _replace_one(self) -> None:
        """Let a pod die, and an empty one join."""
        gone = self._random_pod()
        self.figures.failures += 1
        for copy in list(gone.copies.values()):
            self._forget(copy)
            if copy.model not in self.holders:
                self._lost[copy.model] = self.now_s
        del self.pods[gone.instance_id]
        joined = SimPod(f"pod{self._next_pod}")
        self._next_pod += 1
        self.pods[joined.instance_id] = joined
        self.figures.record_bytes += self._policy.changed(joined, self.now_s)
