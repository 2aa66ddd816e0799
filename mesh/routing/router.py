"""One routing decision, whatever carries the request: which copy, after waiting for one if none is loaded.

Knows copies, pods and how long a request may wait; nothing of gRPC, HTTP or bytes.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from mesh.errors import DeadlineExceeded, LoadFailed, NotFound, Overloaded, Unavailable
from mesh.metrics import Metrics
from mesh.placement.copies import Changes, LocalCopies, epoch_ms
from mesh.placement.load_times import retry_after_s
from mesh.placement.placement import Placement
from mesh.registry.records import InstanceRecord, ModelRecord
from mesh.registry.registration import name_in
from mesh.registry.registry import Registry
from mesh.routing.concurrency_limit import ConcurrencyLimit
from mesh.routing.copy_selection import Candidate, choose
from mesh.types import CopyState, ModelStatus, Target, Tier

T = TypeVar("T")

_FORGOTTEN_S = 5.0  # a pod that said NOT_FOUND isn't asked for that model until its record had time to say so
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """`wait_budget_s`: how long a request may wait for its model. `max_held`: how many may wait for one."""

    wait_budget_s: float
    max_held: int


class CopyRouter:
    """`local`: the target that stands for this pod's own runtime."""

    def __init__(
        self,
        registry: Registry,
        placement: Placement,
        copies: LocalCopies,
        changes: Changes,
        metrics: Metrics,
        local: Target,
        limits: Limits,
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._copies = copies
        self._changes = changes
        self._metrics = metrics
        self._local = local
        self._limits = limits
        self._to_peers: Counter[tuple[str, str]] = Counter()
        self._forgotten_until_s: dict[tuple[str, str], float] = {}
        self._turns: dict[
            str, tuple[int, ConcurrencyLimit]
        ] = {}  # of local copies with a limit, and which load of theirs
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Requests that wait for a model are refused from now on."""
        self._stopping.set()
        self._changes.tell()

    async def route(
        self,
        model_id: str,
        *,
        deadline_s: float | None,
        prefix_hash: str = "",
        exclude: frozenset[str] = frozenset(),
        here: bool = False,
    ) -> Target:
        """The copy with the least expected wait, loading the model if no pod has it. It counts as in use when this returns: the caller ends with `end`.

        `deadline_s` is the time left. `here`: another pod sent it, so only this pod's copy will do; NotFound if there is none.
        Raises NotFound, LoadFailed, Unavailable (waited too long; carries retry_after_s), Overloaded, DeadlineExceeded.
        """
        if here and self._copies.get(model_id) is None:
            raise NotFound(f"model {model_id} is not on this pod")
        while True:
            target = self._choose(model_id, prefix_hash, exclude, here)
            if target is None:
                target = await self._held(
                    model_id, deadline_s, self._until_chosen(model_id, prefix_hash, exclude, here), "loaded"
                )
            if not target.local or await self._has_turn(model_id, target, deadline_s):
                self.begin(model_id, target)
                return target

    def is_loaded(self, model_id: str) -> bool:
        """Whether a request for it would go on without waiting here."""
        return self._choose(model_id, "", frozenset(), False) is not None

    def begin(self, model_id: str, target: Target) -> None:
        self._metrics.in_flight(model_id, +1)
        if target.local:
            self._copies.begin(model_id)
        else:
            self._to_peers[model_id, target.instance_id] += 1

    def end(self, model_id: str, target: Target) -> None:
        self._metrics.in_flight(model_id, -1)
        if target.local:
            self._copies.end(model_id)
            generation, turns = self._turns.get(model_id, (0, None))
            if turns is not None and generation == target.generation:
                turns.give_back()
            return
        self._to_peers[model_id, target.instance_id] -= 1
        if not self._to_peers[model_id, target.instance_id]:
            del self._to_peers[model_id, target.instance_id]

    def forget(self, model_id: str, target: Target) -> None:
        """The target said NOT_FOUND. A local runtime that says so is asked to load it again: loading is idempotent, so a false alarm costs one call."""
        if not target.local:
            self._forgotten_until_s[model_id, target.instance_id] = time.monotonic() + _FORGOTTEN_S
            return
        copy = self._copies.get(model_id)
        if copy is not None and copy.loaded and copy.started_ms == target.generation:
            self._placement.load_here(model_id, last_used_ms=epoch_ms())

    async def _has_turn(self, model_id: str, target: Target, deadline_s: float | None) -> bool:
        """Waits for it, if the copy takes only so many requests at once. False: it has left meanwhile, and another is to be chosen."""
        copy = self._copies.get(model_id)
        if copy is None or not copy.max_concurrency:
            self._turns.pop(model_id, None)
            return True
        generation, turns = self._turns.get(model_id, (0, None))
        if turns is None or generation != copy.started_ms:
            turns = ConcurrencyLimit(copy.max_concurrency)
            self._turns[model_id] = copy.started_ms, turns
        await self._held(model_id, deadline_s, turns.take(self._registry.name_of(model_id)), "free")
        if copy.started_ms == target.generation and copy.loaded:
            return True
        turns.give_back()
        return False

    async def _held(self, model_id: str, deadline_s: float | None, wait: Coroutine[Any, Any, T], until: str) -> T:
        """`wait`, within the time and the number of requests that may wait for one model. `until`: what they wait for it to be."""
        held = self._copies.held(model_id)
        if held >= self._limits.max_held:
            wait.close()
            raise Overloaded(
                f"model {self._registry.name_of(model_id)}: {held} requests are waiting for it to be loaded; the limit is {self._limits.max_held}",
                retry_after_s=retry_after_s(self._placement.expected_wait_s(model_id)),
            )
        budget_s = self._limits.wait_budget_s
        by_deadline = deadline_s is not None and deadline_s < budget_s
        self._copies.hold(model_id)
        self._metrics.held(model_id, +1)
        try:
            async with asyncio.timeout(deadline_s if by_deadline else budget_s):
                return await wait
        except TimeoutError:
            if by_deadline:
                raise DeadlineExceeded(
                    f"model {self._registry.name_of(model_id)}: the deadline passed before it was {until}"
                ) from None
            raise Unavailable(
                f"model {self._registry.name_of(model_id)}: not {until} within the wait budget of {budget_s:g} s",
                retry_after_s=retry_after_s(self._placement.expected_wait_s(model_id)),
            ) from None
        finally:
            self._metrics.held(model_id, -1)
            self._copies.release(model_id)

    async def _until_chosen(self, model_id: str, prefix_hash: str, exclude: frozenset[str], here: bool) -> Target:
        while True:
            if self._stopping.is_set():
                raise _leaving()
            if self._local.instance_id in exclude:
                # our runtime failed a moment ago, and what it told of itself may be older than that
                await self._unless_stopping(self._placement.runtime.newer_account())
                exclude -= {self._local.instance_id}
            target = self._choose(model_id, prefix_hash, exclude, here)
            if target is not None:
                return target
            await self._load(model_id, here)

    async def _load(self, model_id: str, here: bool) -> None:
        """Until something is different: it is loaded, or is not going to be (raises), or a copy is elsewhere than thought."""
        copy = self._copies.get(model_id)
        if copy is not None and copy.loaded:
            # it can't be used now: the runtime or its engine is coming back
            await self._changes.wait(_LOOK_S)
            return
        # a copy elsewhere that wasn't chosen is out of reach, or not there in truth
        elsewhere = (
            self._placement.status(model_id).status in (ModelStatus.LOADED, ModelStatus.LOADING) and copy is None
        )
        outcome = await self._unless_stopping(
            self._placement.ensure_loaded(model_id, wait=True, here=here or elsewhere)
        )
        if outcome.status is ModelStatus.LOADING_FAILED:
            blocked_s = self._placement.blocked_for_s(model_id)
            name = self._registry.name_of(model_id)
            cause = (
                outcome.errors[0].removeprefix(f"model {model_id}: ") if outcome.errors else "the cause is not known"
            )
            cause = cause.replace(model_id, name)  # people know the name
            raise LoadFailed(
                f"model {name} failed to load: {cause}", retry_after_s=retry_after_s(blocked_s) if blocked_s else None
            )
        if outcome.status is ModelStatus.NOT_FOUND:
            raise NotFound(f"model {name_in(model_id)} was unregistered")

    async def _unless_stopping(self, work: Coroutine[Any, Any, T]) -> T:
        """A load may take longer than this pod is given to end."""
        task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _leaving()
            return task.result()
        finally:
            task.cancel()
            stopping.cancel()

    def _choose(self, model_id: str, prefix_hash: str, exclude: frozenset[str], here: bool) -> Target | None:
        candidates = []
        copy = self._copies.get(model_id)
        own_id = self._local.instance_id
        if copy is not None and copy.loaded and self._placement.runtime.serves(copy) and own_id not in exclude:
            candidates.append(self._own_candidate(model_id))
        record = self._registry.models.get(model_id)
        pods: dict[str, InstanceRecord] = {}
        if not here and record is not None and record.instance_ids.keys() - {own_id}:
            pods = dict(self._registry.instances.live())
            candidates += self._peer_candidates(model_id, record, pods, exclude)
        chosen = choose(candidates, prefix_hash)
        if chosen is None:
            return None
        if chosen.local:
            assert copy is not None
            return Target(own_id, True, self._local.grpc_address, self._local.http_address, copy.started_ms)
        pod = pods[chosen.instance_id]
        return Target(chosen.instance_id, False, pod.grpc_address, pod.http_address)

    def _own_candidate(self, model_id: str) -> Candidate:
        model = self._placement.runtime.model(model_id)
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
        self, model_id: str, record: ModelRecord, pods: dict[str, InstanceRecord], exclude: frozenset[str]
    ) -> list[Candidate]:
        """A copy that is still loading elsewhere is one too: that pod holds the request, and tells of its progress."""
        now_s = time.monotonic()
        found = []
        for pod_id, since_ms in record.instance_ids.items():
            pod = pods.get(pod_id)
            if pod is None or not pod.grpc_address or pod_id == self._local.instance_id or pod_id in exclude:
                continue
            if self._forgotten_until_s.get((model_id, pod_id), 0.0) > now_s:
                continue
            report = pod.copies.get(model_id)
            loaded = report is not None and report.state is CopyState.LOADED
            if report is not None and report.state is CopyState.UNLOADING:
                continue
            elapsed_s = max(0.0, (epoch_ms() - since_ms) / 1000)  # another clock may be ahead
            found.append(
                Candidate(
                    pod_id,
                    False,
                    tier=report.tier if report is not None and loaded else Tier.DEVICE,
                    loading_s=0.0 if loaded else max(0.1, self._placement.expected_load_s(model_id) - elapsed_s),
                    swap_in_s=report.swap_in_s if report else 0.0,
                    running=report.running if report else 0,
                    waiting=report.waiting if report else 0,
                    in_flight=self._to_peers[model_id, pod_id],
                    kv_usage=pod.kv_usage,
                )
            )
        return found


def _leaving() -> Unavailable:
    return Unavailable("this pod is shutting down", retry_after_s=1)
