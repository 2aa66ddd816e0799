"""Chooses the pod that loads a model, and has it loaded there."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from common.changes import Changes
from common.clock import epoch_ms
from mesh.errors import LoadFailed, MeshError, NotFound, Unavailable
from mesh.placement.copies import LocalCopies
from mesh.placement.failures import MAX_FAILURES, lost_base_text
from mesh.placement.learned_copies import LearnedCopies
from mesh.placement.loads import LocalLoads
from mesh.placement.model_states import ModelStates
from mesh.placement.outage_plan import OutageView, order_pods
from mesh.placement.peer_loads import PeerLoads
from mesh.placement.plan import plan
from mesh.placement.pod_views import of_adapter, own_view, view_of
from mesh.placement.record_updates import RecordUpdates
from mesh.placement.runtime_monitor import RuntimeMonitor
from mesh.placement.type_constraints import TypeConstraints
from mesh.registry.records import CAPACITY_UNIT_BYTES, InstanceRecord, ModelRecord
from mesh.registry.registry import Registry
from mesh.types import ModelStatus, RuntimeClient, StatusInfo

logger = logging.getLogger(__name__)

_ANNOUNCE_S = 1.0
_REMOTE_START_S = 5.0  # a pod that was asked to load has announced it by then
_UNLOAD_S = 60.0


class NoPod(Unavailable):
    """No pod may load the model now. That changes when a pod joins or becomes able to serve."""


@dataclass(frozen=True, slots=True)
class _Order:
    """One load. `urgent` False: it displaces only models that were last used before `last_used_ms`. `avoid`: see `ensure_loaded`.

    `must_see_end`: the caller waits for the end of the load, which this pod does not see at another pod while the store is away.
    """

    last_used_ms: int
    urgent: bool
    local_only: bool
    avoid: frozenset[str]
    must_see_end: bool = False


class Placement:
    """Implements mesh.types.Loader: chooses the pod that loads a model, and has it loaded there."""

    def __init__(
        self,
        registry: Registry,
        runtime: RuntimeClient,
        record_updates: RecordUpdates,
        copies: LocalCopies,
        loads: LocalLoads,
        peers: PeerLoads,
        states: ModelStates,
        learned: LearnedCopies,
        monitor: RuntimeMonitor,
        changes: Changes,
        *,
        constraints: TypeConstraints,
        own_labels: tuple[str, ...],
        unreachable: Callable[[str], None],
    ) -> None:
        """`unreachable` is called with a pod that did not accept a load."""
        self._registry = registry
        self._runtime = runtime
        self._record_updates = record_updates
        self._copies = copies
        self._loads = loads
        self._peers = peers
        self._states = states
        self._learned = learned
        self._monitor = monitor
        self._changes = changes
        self._constraints = constraints
        self._own_labels = own_labels
        self._unreachable = unreachable
        self._own_id = registry.instances.own_id

    async def ensure_loaded(
        self,
        model_id: str,
        *,
        last_used_ms: int = 0,
        wait: bool = False,
        retry_failed: bool = False,
        local_only: bool = False,
        avoid: frozenset[str] = frozenset(),
        begun_elsewhere_suffices: bool = False,
    ) -> StatusInfo:
        """Implement Loader. `retry_failed`: an explicit load request, which clears earlier failures. `local_only`: load on this pod even if another
        one has a copy. `avoid`: pods whose copies do not count, and that are asked to load only if no other pod can. `begun_elsewhere_suffices`:
        with `wait`, return as soon as another pod loads the model, because it holds the requests that are forwarded to it.

        Raises NotFound; with `wait` also Overloaded (all models are in use, so there is no room) and Unavailable (the runtime is gone).
        """
        record = await self._registry.models.find(model_id)
        if record is None:
            raise NotFound(f"model {model_id} not found")
        used_ms = last_used_ms or epoch_ms()
        self._copies.touch(model_id, used_ms)
        must_see_end = wait and not begun_elsewhere_suffices
        status = self._states.status(model_id, besides=avoid, as_recorded=must_see_end)
        now = self._states.local_status(model_id) if local_only else status.status
        if now is ModelStatus.LOADED or (now is ModelStatus.LOADING and not wait):
            return status
        if now is not ModelStatus.LOADING:
            if lost := await self._registry.lost_base(record.info):
                return StatusInfo(ModelStatus.LOADING_FAILED, (lost_base_text(lost),))
            if retry_failed:
                await self._clear_failures(model_id)
            elif self._states.blocked_for_s(model_id) > 0:
                return status
        order = _Order(used_ms, last_used_ms == 0 or retry_failed, local_only, avoid, must_see_end)
        if wait:
            return await self._load_and_wait(
                model_id,
                order,
                is_loading=now is ModelStatus.LOADING,
                begun_elsewhere_suffices=begun_elsewhere_suffices,
            )
        await self._begin(model_id, order)
        return self._states.status(model_id)

    async def load_for_peer(self, model_id: str, *, last_used_ms: int, urgent: bool, is_extra: bool) -> None:
        """Begin a load that another pod has planned. Raises NotFound."""
        record = await self._registry.models.find(model_id)
        if record is None:
            raise NotFound(f"model {model_id} not found")
        self._copies.touch(model_id, last_used_ms)
        if self._states.local_status(model_id) is ModelStatus.NOT_LOADED:
            self._loads.load(model_id, record.info, last_used_ms=last_used_ms, urgent=urgent, is_extra=is_extra)

    async def _load_and_wait(
        self, model_id: str, order: "_Order", *, is_loading: bool, begun_elsewhere_suffices: bool
    ) -> StatusInfo:
        """Load, and after a failure try further pods, as in ModelMesh up to three."""
        for _ in range(MAX_FAILURES):
            begun_at = "" if is_loading else await self._begin(model_id, order)
            is_loading = False
            status = self._states.status(model_id, besides=order.avoid)
            if not (begun_elsewhere_suffices and begun_at not in ("", self._own_id)):
                status = await self._outcome(model_id, order.avoid, begun_at)
            if status.status is not ModelStatus.LOADING_FAILED or order.local_only:
                break
            if self._states.blocked_for_s(model_id) > 0:
                break
        if status.status is ModelStatus.NOT_LOADED and not order.must_see_end:
            # A load that the record does not show continues at another pod.
            return self._states.status(model_id, besides=order.avoid)
        return status

    async def unload(self, model_id: str, *, now: bool = False) -> None:
        """Implement Loader. `now`: end running requests instead of waiting for them within the grace period."""
        record = self._registry.models.get(model_id)
        holders = set(record.instance_ids) - {self._own_id} if record is not None else set()
        await self._record_updates.clear_instances(model_id)
        if now:
            for pod_id, pod in self._registry.instances.live():
                if pod_id in holders:
                    with contextlib.suppress(
                        MeshError
                    ):  # The pod unloads within its grace period, as its record shows.
                        await self._peers.unload_now(pod, model_id)
        await self.unload_locally(model_id, now=now)
        if self._states.is_quarantined(model_id):
            await self._clear_failures(model_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UNLOAD_S):
                while any(
                    model_id in pod.copies for pod_id, pod in self._registry.instances.live() if pod_id != self._own_id
                ):
                    await self._changes.wait()

    async def unload_locally(self, model_id: str, *, now: bool) -> None:
        """Unload this pod's copy."""
        await self._loads.unload(model_id, now=now)

    def pods_for(self, model_type: str) -> set[str]:
        """Return the pods whose labels allow a model of this type."""
        constraint, pods = self._constraints.of(model_type), self._states.pods()
        return {pod_id for pod_id in pods if constraint.allows(self._labels(pod_id, pods))}

    def has_other_pod(self, model_id: str, avoid: Set[str]) -> bool:
        """Return whether a pod that is not in `avoid` may load the model."""
        record = self._registry.models.get(model_id)
        if record is None:
            return False
        constraint, pods = self._constraints.of(record.info.type), self._states.pods()
        return any(
            constraint.allows(self._labels(pod_id, pods)) and (pod.http_address or pod_id == self._own_id)
            for pod_id, pod in pods.items()
            if pod_id not in avoid
        )

    def load_locally(self, model_id: str, *, last_used_ms: int, urgent: bool = True) -> None:
        record = self._registry.models.get(model_id)
        if record is not None:
            self._loads.load(model_id, record.info, last_used_ms=last_used_ms, urgent=urgent)

    async def _clear_failures(self, model_id: str) -> None:
        """Clear the recorded failures, and end the runtime's quarantine of the model."""
        if self._states.is_quarantined(model_id):
            with contextlib.suppress(Unavailable):
                await self._runtime.unload(model_id, allow_retry=True)
        await self._record_updates.clear_failures(model_id)

    async def _begin(self, model_id: str, order: "_Order") -> str:
        """Begin a load on the best pod that accepts it, and return its id, empty if none may now. Raises LoadFailed and Unavailable if none ever may."""
        record = self._states.record(model_id)
        if record is None:
            raise NotFound(f"model {model_id} not found")
        pods = self._states.pods()
        constraint = self._constraints.of(record.info.type)
        if not any(constraint.allows(self._labels(pod_id, pods)) for pod_id in {self._own_id, *pods}):
            raise LoadFailed(
                "There are no running instances that meet the label requirements of type "
                f"{record.info.type}: [{', '.join(constraint.required)}]"
            )
        is_extra = bool(order.avoid) or order.local_only
        if not order.local_only and pods.keys() - {self._own_id}:
            for pod_id in await self._targets(model_id, record, pods, order):
                if pod_id == self._own_id or await self._begin_at(pod_id, pods[pod_id], model_id, order, is_extra):
                    if pod_id == self._own_id:
                        break
                    return pod_id
        if self._own_id in order.avoid and self._copies.get(model_id) is not None:
            raise NoPod("no other pod can load it now", model=model_id)
        if (
            not order.local_only
            and pods.keys() - {self._own_id}
            and not self._states.may_load(model_id, record, self._own_id)
        ):
            return ""
        if not constraint.allows(self._labels(self._own_id, pods)):
            raise NoPod("no pod that meets its label requirements can load it now", model=model_id)
        self._loads.load(model_id, record.info, last_used_ms=order.last_used_ms, urgent=order.urgent, is_extra=is_extra)
        return self._own_id

    async def _begin_at(self, pod_id: str, pod: InstanceRecord, model_id: str, order: "_Order", is_extra: bool) -> bool:
        """Have a peer begin the load. Return whether it did."""
        record = self._registry.models.get(model_id)
        failed_ms = record.failed_in.get(pod_id) if record is not None else None
        is_announced = not self._learned.is_store_away()
        try:
            await self._peers.load(
                pod,
                model_id,
                last_used_ms=order.last_used_ms,
                urgent=order.urgent,
                # Only this pod may have lost the store. What the others see then is not what this pod goes by.
                is_extra=is_extra or not is_announced,
            )
        except MeshError as error:
            self._unreachable(pod_id)
            logger.warning("model %s: pod %s cannot load it, trying the next: %s", model_id, pod_id, error.message)
            return False
        if is_announced:
            await self._announced(model_id, pod_id, failed_ms, order.avoid)
        else:
            self._learned.gained(model_id, pod_id)
        return True

    async def try_elsewhere(self, model_id: str, record: ModelRecord) -> None:
        """After a failure here, have another pod load the model; as in ModelMesh, up to three pods try."""
        pods = self._states.pods()
        if record.instance_ids.keys() & pods.keys() or self._states.record_blocked_for_s(model_id, record) > 0:
            return
        order = _Order(record.last_used_ms, False, False, frozenset({self._own_id}))
        for pod_id in await self._plan(model_id, record, pods, order.avoid):
            if pod_id != self._own_id and await self._begin_at(pod_id, pods[pod_id], model_id, order, False):
                return

    async def _announced(self, model_id: str, pod_id: str, failed_ms: int | None, avoid: Set[str]) -> None:
        """Wait until the peer's load is in the record or has failed, so that the status says so when this returns."""
        others = self._states.others() - avoid

        def is_known(record: ModelRecord | None) -> bool:
            return (
                record is None
                or bool(record.instance_ids.keys() & {pod_id, *others})
                or record.failed_in.get(pod_id) != failed_ms
            )

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANNOUNCE_S):
                await self._registry.models.table.until(model_id, is_known)

    async def _targets(
        self, model_id: str, record: ModelRecord, pods: Mapping[str, InstanceRecord], order: "_Order"
    ) -> tuple[str, ...]:
        """Return the pods to ask for the load, the best one first; none if this pod has to load the model itself."""
        if not self._learned.is_store_away():
            return await self._plan(model_id, record, pods, order.avoid)
        return () if order.must_see_end else await self._order_without_store(model_id, record, pods, order.avoid)

    async def _order_without_store(
        self, model_id: str, record: ModelRecord, pods: Mapping[str, InstanceRecord], avoid: Set[str]
    ) -> tuple[str, ...]:
        """Return the pods to ask in the order in which every pod asks them, so that the model is loaded once and not by each pod."""
        constraint = self._constraints.of(record.info.type)
        base = await self._base_of(record)
        views = [
            OutageView(
                pod_id,
                pod.capacity_units * CAPACITY_UNIT_BYTES,
                has_base=base is not None and pod_id in base.instance_ids,
                has_files=pod_id in record.files_in,
            )
            for pod_id, pod in pods.items()
            if pod_id not in avoid
            and not self._learned.refuses(model_id, pod_id)
            and pod.capacity_units * CAPACITY_UNIT_BYTES >= record.weight_bytes
            and constraint.allows(self._labels(pod_id, pods))
            and self._states.may_load(model_id, record, pod_id)
            and (not self._states.is_quarantined(model_id) if pod_id == self._own_id else pod.http_address)
        ]
        return order_pods(views, model_id)

    async def _plan(
        self, model_id: str, record: ModelRecord, pods: Mapping[str, InstanceRecord], avoid: Set[str]
    ) -> tuple[str, ...]:
        """Return the pods to load the model on, the best one first; those in `avoid` only if there are no others."""
        size_bytes = record.weight_bytes
        if not size_bytes and self._monitor.is_serving:
            size_bytes = await self._runtime.predict_size(model_id, record.info) or 0
        limits = self._monitor.limits
        constraint = self._constraints.of(record.info.type)
        base = await self._base_of(record)
        zones = {pods[pod_id].zone for pod_id in record.instance_ids if pod_id in pods} - {""}
        views = [
            of_adapter(base, view_of(pod_id, pod, record, constraint.num_preferred(self._labels(pod_id, pods)), zones))
            for pod_id, pod in pods.items()
            if constraint.allows(self._labels(pod_id, pods))
            and self._states.may_load(model_id, record, pod_id)
            and (not self._states.is_quarantined(model_id) if pod_id == self._own_id else pod.http_address)
        ]
        own = (self._copies.usage(), self._loads.num_loading, self._loads.num_failed_in_a_row)
        views = [own_view(view, *own) if view.instance_id == self._own_id else view for view in views]
        return plan(
            [view for view in views if view.instance_id not in avoid] or views,
            model_id,
            size_bytes or (limits.default_model_size_bytes if limits else 0),
            load_s=self._states.expected_load_s(model_id),
        )

    async def _base_of(self, record: ModelRecord) -> ModelRecord | None:
        """Return the base of a LoRA adapter, None for other models and for a base that is not registered."""
        try:
            base = await self._registry.base_of(record.info)
        except NotFound:
            return None
        return None if base is None else self._registry.models.get(base[0])

    async def _outcome(self, model_id: str, avoid: frozenset[str], begun_at: str) -> StatusInfo:
        """Wait for the end of a load. `begun_at`: the pod that began it; empty if it was loading before."""
        started_s = time.monotonic()
        while True:
            task = self._loads.task(model_id)
            if task is not None:
                # asyncio.shield would cancel the waiters of a load that is cancelled.
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
                status = self._states.status(model_id, besides=avoid)
                if status.status is not ModelStatus.LOADING:
                    return status
                started_s = time.monotonic()
                continue
            # At another pod, a load that the record does not show is not seen to end.
            status = self._states.status(model_id, besides=avoid, as_recorded=True)
            starting = (
                status.status is ModelStatus.NOT_LOADED
                and begun_at in self._states.others()
                and time.monotonic() - started_s < _REMOTE_START_S
            )
            if status.status is not ModelStatus.LOADING and not starting:
                return status
            await self._changes.wait(_REMOTE_START_S)

    def _labels(self, pod_id: str, pods: Mapping[str, InstanceRecord]) -> tuple[str, ...]:
        if pod_id == self._own_id:
            return self._own_labels
        return pods[pod_id].labels if pod_id in pods else ()
