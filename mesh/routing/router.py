"""Routes a request to a copy of its model, and holds it while no copy is loaded."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from common.changes import Changes
from common.clock import epoch_ms
from common.model_state import CopyState
from mesh.errors import DeadlineExceeded, LoadFailed, MeshError, NotFound, Overloaded, Unavailable
from mesh.observability.metrics import Metrics
from mesh.placement.copies import LocalCopies
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.load_times import retry_after_s
from mesh.placement.model_states import ModelStates
from mesh.placement.placement import NoPod, Placement
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.registry.registration import name_in
from mesh.registry.registry import Registry
from mesh.routing.attempts import Attempt, Attempts, Outcome, RoutingRequest
from mesh.routing.concurrency_limit import ConcurrencyLimit
from mesh.routing.copy_finder import CopyFinder
from mesh.routing.copy_health import CopyHealth
from mesh.routing.in_flight import InFlight
from mesh.routing.peer_health import PeerHealth
from mesh.types import ModelStatus, Target

T = TypeVar("T")

logger = logging.getLogger(__name__)

_RECHECK_S = 1.0
_PATIENCE_S = 1.0  # for records that are about to change
_REFRESH_S = 2.0  # a runtime that answers does so sooner
_LOOK_S = 0.25  # a load on this pod ends when its runtime does not answer any more


class _RuntimeLostError(Exception):
    """This pod's runtime stopped answering while a request waited for a load on it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`wait_budget_s`: how long a request may wait for its model. `max_held`: how many requests may wait for one model.

    `max_in_flight_per_copy`: as in ConcurrencyLimit.
    """

    wait_budget_s: float
    max_held: int
    max_in_flight_per_copy: int = 0


class CopyRouter:
    """`local`: the target that stands for this pod's own runtime. `is_cut_off`: whether only this pod has lost the store."""

    def __init__(
        self,
        registry: Registry,
        placement: Placement,
        states: ModelStates,
        monitor: RuntimeMonitor,
        copies: LocalCopies,
        learned: LearnedCopies,
        changes: Changes,
        metrics: Metrics,
        local: Target,
        limits: Limits,
        in_flight: InFlight,
        peer_health: PeerHealth,
        *,
        is_cut_off: Callable[[], bool],
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._states = states
        self._monitor = monitor
        self._copies = copies
        self._changes = changes
        self._metrics = metrics
        self._local = local
        self._limits = limits
        self._in_flight = in_flight
        self._peer_health = peer_health
        self._copy_health = CopyHealth()
        self._is_cut_off = is_cut_off
        self._finder = CopyFinder(
            registry, states, monitor, copies, self._copy_health, learned, local, all_ejected=self._load_beside
        )
        self._loads_beside: dict[str, asyncio.Task[None]] = {}
        # Of local copies with a limit, by model: the load that the limit belongs to, and the limit.
        self._concurrency: dict[str, tuple[int, ConcurrencyLimit]] = {}
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Refuse requests that wait for a model from now on."""
        self._stopping.set()
        self._changes.notify()

    def attempts(self, request: RoutingRequest) -> Attempts:
        return Attempts(self, request)

    async def route(
        self,
        model_id: str,
        *,
        deadline_s: float | None,
        prefix_hash: str = "",
        exclude: frozenset[str] = frozenset(),
        local_only: bool = False,
    ) -> Target:
        """Return the copy with the least expected wait, loading the model if no pod has it. The copy counts as in use until `end`.

        `deadline_s`: seconds left. `local_only`: another pod forwarded the request, so only this pod's copy will do.
        Raises NotFound, LoadFailed, Unavailable (waited too long; carries retry_after_s), Overloaded, DeadlineExceeded.
        """
        if self._is_cut_off():
            raise Unavailable(
                "this pod has lost the registry's store, so its knowledge of the model may be out of date; call another pod",
                model=self._registry.name_of(model_id),
                retry_after_s=1,
            )
        copy = self._copies.get(model_id)
        # A copy that is unloaded may be about to be loaded again: another pod has just asked for it.
        is_gone = copy is None or copy.state is CopyState.UNLOADING
        if local_only and is_gone and self._states.local_status(model_id) is not ModelStatus.LOADING:
            raise NotFound(f"model {model_id} is not on this pod")
        while True:
            target = self._finder.find(model_id, prefix_hash=prefix_hash, exclude=exclude, local_only=local_only)
            if target is None and local_only and not self._monitor.is_serving:
                raise self._runtime_lost(model_id)
            if target is None:
                work = self._wait_for_copy(model_id, prefix_hash, exclude, local_only)
                started_s = time.monotonic()
                target = await self._hold(model_id, deadline_s, work, "loaded")
                self._metrics.waited_for_load(time.monotonic() - started_s)
            if not target.local or not self._is_limited(model_id) or await self._acquire(model_id, target, deadline_s):
                self._count(model_id, target)
                return target

    def begin(self, attempt: Attempt) -> None:
        """Count an attempt at the target that `route` returned."""
        self._in_flight.add(attempt)

    def end(self, attempt: Attempt) -> None:
        """Stop counting an attempt, which has ended, or whose response has."""
        model_id, target = attempt.model_id, attempt.target
        self._in_flight.remove(attempt)
        self._copy_health.record(attempt)
        if not target.local and attempt.outcome is Outcome.FAILED:
            self._peer_health.suspect(target.instance_id)
        self._metrics.in_flight(model_id, -1)
        if not target.local:
            self._finder.end_at_peer(model_id, target.instance_id)
            return
        self._copies.end(model_id)
        generation, limit = self._concurrency.get(model_id, (0, None))
        if limit is not None and generation == target.generation:
            limit.release()

    def mark_lost(self, model_id: str, target: Target) -> None:
        """Note that the target answered that it does not have the model. The local runtime loads it again, which does nothing if it has the model."""
        if not target.local:
            self._finder.mark_lost(model_id, target.instance_id)
            return
        copy = self._copies.get(model_id)
        if copy is not None and copy.is_loaded and copy.started_ms == target.generation:
            self._placement.load_locally(model_id, last_used_ms=epoch_ms())

    async def successor(self, name: str, model_id: str) -> str | None:
        """Return the model that a name has moved to since it was resolved to `model_id`, or None."""
        return await self._registry.successor(name, model_id)

    def _count(self, model_id: str, target: Target) -> None:
        self._metrics.in_flight(model_id, +1)
        if target.local:
            self._copies.begin(model_id)
        else:
            self._copies.uses.add(model_id)
            self._finder.begin_at_peer(model_id, target.instance_id)

    def _is_limited(self, model_id: str) -> bool:
        copy = self._copies.get(model_id)
        return (copy is not None and copy.max_concurrency > 0) or model_id in self._concurrency

    async def _acquire(self, model_id: str, target: Target, deadline_s: float | None) -> bool:
        """Wait for one of the copy's concurrent requests if their number is limited. False if the copy has been unloaded meanwhile."""
        copy = self._copies.get(model_id)
        if copy is None or not copy.max_concurrency:
            self._concurrency.pop(model_id, None)
            return True
        generation, limit = self._concurrency.get(model_id, (0, None))
        if limit is None or generation != copy.started_ms:
            limit = ConcurrencyLimit(copy.max_concurrency, self._limits.max_in_flight_per_copy)
            self._concurrency[model_id] = copy.started_ms, limit
        started_s = time.monotonic()
        await self._hold(model_id, deadline_s, limit.acquire(self._registry.name_of(model_id)), "free")
        self._metrics.waited_for_slot(time.monotonic() - started_s)
        if copy.started_ms == target.generation and copy.is_loaded:
            return True
        limit.release()
        return False

    async def _hold(self, model_id: str, deadline_s: float | None, work: Coroutine[Any, Any, T], condition: str) -> T:
        """Await `work` within the time and the number of requests that may wait for one model. `condition`: what they wait for it to be."""
        num_held = self._copies.num_waiting(model_id)
        if num_held >= self._limits.max_held:
            work.close()
            raise self._too_many_held(model_id, num_held)
        budget_s = self._limits.wait_budget_s
        by_deadline = deadline_s is not None and deadline_s < budget_s
        self._copies.begin_wait(model_id)
        self._metrics.held(model_id, +1)
        try:
            async with asyncio.timeout(deadline_s if by_deadline else budget_s):
                return await work
        except TimeoutError:
            name = self._registry.name_of(model_id)
            if by_deadline:
                raise DeadlineExceeded(f"the deadline passed before it was {condition}", model=name) from None
            raise Unavailable(
                f"not {condition} within the wait budget of {budget_s:g} s",
                model=name,
                limit=budget_s,
                retry_after_s=retry_after_s(self._states.expected_wait_s(model_id)),
            ) from None
        finally:
            self._metrics.held(model_id, -1)
            self._copies.end_wait(model_id)

    def _too_many_held(self, model_id: str, num_held: int) -> Overloaded:
        return Overloaded(
            f"{num_held} requests are waiting for it to be loaded; the limit is {self._limits.max_held}",
            model=self._registry.name_of(model_id),
            limit=self._limits.max_held,
            value=num_held,
            retry_after_s=retry_after_s(self._states.expected_wait_s(model_id)),
        )

    async def _wait_for_copy(
        self, model_id: str, prefix_hash: str, exclude: frozenset[str], local_only: bool
    ) -> Target:
        patience_until_s = time.monotonic() + _PATIENCE_S
        is_loading_elsewhere = False
        while True:
            if self._stopping.is_set():
                raise _shutting_down()
            if self._local.instance_id in exclude and self._monitor.is_serving:
                # The local runtime has just failed, and its last snapshot may predate the failure.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REFRESH_S):
                        await self._unless_stopping(self._monitor.refresh())
            exclude -= {self._local.instance_id}
            target = self._finder.find(model_id, prefix_hash=prefix_hash, exclude=exclude, local_only=local_only)
            if target is not None:
                return target
            if is_loading_elsewhere:
                await self._changes.wait(_PATIENCE_S / 2)  # for the record, or the end of a load on a pod to be avoided
            is_loading_elsewhere = await self._load(
                model_id, local_only, exclude, is_patient=time.monotonic() < patience_until_s
            )
            if time.monotonic() >= patience_until_s:
                exclude = frozenset()  # whatever failed before may be tried again, as the last resort

    async def _load(self, model_id: str, local_only: bool, exclude: frozenset[str], *, is_patient: bool) -> bool:
        """Return when another look is worthwhile: the model is loaded, or its copies changed. Raises if it cannot be loaded.

        The result is True if another pod loads it, which holds the requests that are forwarded to it.
        """
        copy = self._copies.get(model_id)
        avoid = exclude
        if copy is not None and (copy.is_loaded or not self._monitor.is_serving):
            # The copy cannot be used now: the runtime or its engine does not answer.
            avoid |= {self._local.instance_id}
            if local_only and not self._monitor.is_serving:
                raise self._runtime_lost(model_id)
            if local_only or not self._placement.has_other_pod(model_id, avoid):
                await self._changes.wait(_RECHECK_S)
                return False
        # A copy elsewhere that was not chosen does not exist any more, which its record will say.
        is_elsewhere = copy is None and self._states.status(model_id, besides=avoid).status in (
            ModelStatus.LOADED,
            ModelStatus.LOADING,
        )
        if is_elsewhere and is_patient and not local_only:
            await self._changes.wait(_PATIENCE_S / 2)
            return False
        try:
            outcome = await self._unless_stopping(
                self._placement.ensure_loaded(
                    model_id,
                    wait=True,
                    local_only=local_only or is_elsewhere,
                    avoid=frozenset() if is_elsewhere else avoid,
                    begun_elsewhere_suffices=True,
                ),
                needs_runtime=self._monitor.is_serving,
            )
        except _RuntimeLostError:
            if local_only:
                raise self._runtime_lost(model_id) from None
            return False
        except NoPod:
            await self._changes.wait(_RECHECK_S)
            return False
        if outcome.status is ModelStatus.LOADING_FAILED and local_only:
            # The pod that forwarded the request tries others, and reports the failure if none can load the model.
            raise NotFound(f"model {model_id} could not be loaded on this pod")
        if outcome.status is ModelStatus.LOADING_FAILED:
            raise self._load_failed(model_id, outcome.errors)
        if outcome.status is ModelStatus.NOT_FOUND:
            raise NotFound(f"model {name_in(model_id)} was unregistered")
        return outcome.status is ModelStatus.LOADING

    def _load_beside(self, model_id: str, ejected: frozenset[str]) -> None:
        """Load the model on another pod, because all its copies fail; one such load at a time."""
        if model_id in self._loads_beside or not self._placement.has_other_pod(model_id, ejected):
            return
        task = asyncio.create_task(
            self._ensure_beside(model_id, ejected), name=f"load {model_id} beside {len(ejected)}"
        )
        self._loads_beside[model_id] = task
        task.add_done_callback(lambda _: self._loads_beside.pop(model_id, None))

    async def _ensure_beside(self, model_id: str, ejected: frozenset[str]) -> None:
        logger.warning("model %s is loaded on another pod, because its copies on %s fail", model_id, ", ".join(ejected))
        try:
            await self._placement.ensure_loaded(model_id, wait=True, avoid=ejected)
        except MeshError as error:
            logger.warning("model %s could not be loaded on another pod: %s", model_id, error.message)

    def _load_failed(self, model_id: str, errors: tuple[str, ...]) -> LoadFailed:
        blocked_s = self._states.blocked_for_s(model_id)
        record = self._registry.models.get(model_id)
        lasting = record is not None and any(failure.lasting for failure in record.failures.values())
        return LoadFailed(
            errors[0] if errors else "the cause is not known",
            model=self._registry.name_of(model_id),
            retry_after_s=retry_after_s(blocked_s) if blocked_s and not lasting else None,
            lasting=lasting,
        )

    def _runtime_lost(self, model_id: str) -> Unavailable:
        """Return the error of a forwarded request. The pod that forwarded it can have another pod answer it; this one would hold it."""
        name = self._registry.name_of(model_id)
        return Unavailable("this pod's runtime does not answer", model=name, retry_after_s=1)

    async def _unless_stopping(self, work: Coroutine[Any, Any, T], *, needs_runtime: bool = False) -> T:
        """Await `work`, which may take longer than this pod's grace period. Raises Unavailable as soon as the pod shuts down.

        `needs_runtime`: also raise _RuntimeLostError when this pod's runtime does not answer any more.
        """
        task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self._stopping.wait())
        look_s = _LOOK_S if needs_runtime else None
        try:
            while not task.done():
                await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED, timeout=look_s)
                if not task.done() and stopping.done():
                    raise _shutting_down()
                if not task.done() and needs_runtime and not self._monitor.is_serving:
                    raise _RuntimeLostError
            return task.result()
        finally:
            task.cancel()
            stopping.cancel()


def _shutting_down() -> Unavailable:
    return Unavailable("this pod is shutting down", retry_after_s=1)
