"""Carries slabs between the engines that share devices, as slab_broker decides from what they report."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from common.changes import Changes
from common.decayed_uses import DecayedUses
from common.model_state import ModelFigures, Tier
from runtime.engine_client.slab_broker import EngineShare, IdleModel, ResizeOrder, plan_resizes
from runtime.eviction_worth import eviction_worth
from runtime.ipc.messages import Command, DeviceShareFigures, EngineStats, Hello, Resize

logger = logging.getLogger(__name__)

_LOOK_S = 0.25  # requests become overdue without any report
_RETRY_S = 0.05  # after an engine kept more than it was asked to keep
_REPAIR_S = 1.0  # after an exception
_RETRY_GROWTH_S = 0.25  # after the driver had less than expected: the memory of a process that ended is released late
_MOST_DOUBLINGS = 8
_GUESSED_BYTES_PER_S = 40e9  # of a return whose time was never reported


class SharingEngine(Protocol):
    """An engine that shares its devices.

    Attributes:
        hello: None until its first start.
        stats: its last report; None while no process of it runs.
        restarts: how often its process has ended.
    """

    hello: Hello | None
    stats: EngineStats | None
    restarts: int

    def running(self, model_id: str) -> int:
        """Return the number of the model's open sequences, queued ones included."""

    def send(self, command: Command) -> bool:
        """Queue a command. Returns False if no engine is ready."""


@dataclass(slots=True)
class _Member:
    """An engine that shares its devices.

    Attributes:
        devices: their numbers, as text.
        overhead_bytes: what its process takes on each device besides its slabs.
        is_home: it is started with the runtime, and not when a model needs it.
        asked_s: since when the process is to be started; None = not at all, or it was allowed to.
        is_admitted: there is room for the process.
        pending: the last command, until it is complete.
        retry_s: until when it takes no command.
        get_s: until when it gets no slabs.
        num_short: commands in a row after which the driver had less than expected.
    """

    client: SharingEngine
    devices: tuple[str, ...]
    overhead_bytes: int
    is_home: bool
    asked_s: float | None = None
    is_admitted: bool = False
    pending: Resize | None = None
    sent: int = 0
    restarts: int = 0
    retry_s: float = 0.0
    get_s: float = 0.0
    num_short: int = 0
    given_s: float = float("-inf")


@dataclass(slots=True)
class SlabSharing:
    """Moves slabs between engines. Event loop only.

    Attributes:
        changes: wakes `run`: the reports of all engines.
        bases: the base of each loaded adapter, by id.
    """

    changes: Changes
    bases: Mapping[str, str]
    _members: list[_Member] = field(default_factory=list)
    _uses: DecayedUses = field(default_factory=DecayedUses)
    _return_s: dict[str, float] = field(default_factory=dict)  # model → how long its last reported return takes

    def add(self, client: SharingEngine, devices: Sequence[int], overhead_bytes: int, *, is_home: bool) -> None:
        """Add an engine. All engines must be added before `run`."""
        self._members.append(_Member(client, tuple(map(str, devices)), overhead_bytes, is_home, is_admitted=is_home))

    def renew(self, old: SharingEngine, client: SharingEngine) -> None:
        """Put a new client in the place of one whose engine has ended, or was never ready. The memory of its process is free again."""
        number = self._members.index(self._member(old))
        member = self._members[number]
        self._members[number] = _Member(client, member.devices, member.overhead_bytes, member.is_home)

    def use(self, model_id: str) -> None:
        """Count a use of a model."""
        self._uses.add(self.bases.get(model_id, model_id))

    def forget(self, model_id: str) -> None:
        """Drop what was counted of a model that is unloaded."""
        self._uses.forget(model_id)
        self._return_s.pop(model_id, None)

    async def admit(self, client: SharingEngine) -> None:
        """Wait until there is room for the process of an engine that is to be started."""
        member = self._member(client)
        if member.asked_s is None:
            member.asked_s = asyncio.get_running_loop().time()
            member.is_admitted = member.overhead_bytes == 0
            self.changes.notify()
        while not member.is_admitted:
            await self.changes.wait()

    def overhead_bytes(self, devices: Sequence[int], besides: SharingEngine) -> int:
        """Return the most memory that the processes of further engines, without that of `besides`, take on one of the devices."""
        taken = [
            sum(
                member.overhead_bytes
                for member in self._members
                if member.client is not besides
                and not member.is_home
                and member.is_admitted
                and str(device) in member.devices
            )
            for device in devices
        ]
        return max(taken, default=0)

    async def run(self) -> None:
        """Move slabs until cancelled."""
        while True:
            seen = self.changes.version
            try:
                is_lacking = self.step(asyncio.get_running_loop().time())
            except Exception:
                logger.exception("memory could not be moved between engines; the next attempt is in %g s", _REPAIR_S)
                await asyncio.sleep(_REPAIR_S)
                continue
            await self.changes.wait(_LOOK_S if is_lacking else None, since=seen)

    def step(self, now_s: float) -> bool:
        """Send the commands of this moment. Returns whether an engine lacks slabs."""
        homes = [member for member in self._members if member.is_home]
        if any(member.client.hello is None for member in homes):
            return False
        capacity: dict[str, int] = {}
        slab_bytes = 1
        for member in homes:
            hello = member.client.hello
            assert hello is not None, "all have reported"
            slab_bytes = hello.slab_bytes
            capacity |= dict.fromkeys(member.devices, hello.device_budget_bytes // slab_bytes)
        shares = [self._share_of(member, slab_bytes, now_s) for member in self._members]
        for order in plan_resizes(capacity, shares, now_s):
            self._send(self._members[order.engine], order, shares[order.engine], now_s)
        return any(share.needed or share.wanted or not share.is_ready or not share.can_get for share in shares)

    def _send(self, member: _Member, order: ResizeOrder, share: EngineShare, now_s: float) -> None:
        if not member.is_admitted:
            member.is_admitted = True
            self.changes.notify()
            return
        member.sent += 1
        command = Resize(member.sent, order.num_slabs, order.evict, order.drain)
        if member.client.send(command):
            member.pending = command
            if order.num_slabs > share.held:
                member.given_s = now_s

    def _share_of(self, member: _Member, slab_bytes: int, now_s: float) -> EngineShare:
        stats = member.client.stats
        overhead = -(-member.overhead_bytes // slab_bytes)
        if not member.is_admitted:
            lacks = overhead if member.asked_s is not None else 0
            return EngineShare(member.devices, needed=lacks, wanted=lacks, since_s=member.asked_s or 0.0)
        if member.restarts != member.client.restarts:
            # The process has ended, and its slabs are with the driver.
            member.restarts, member.pending, member.sent = member.client.restarts, None, 0
        if stats is None or stats.share is None:
            return EngineShare(member.devices, overhead=overhead, is_ready=False)
        share = stats.share
        self._settle(member, share, now_s)
        idle, swap_s = self._idle_models(member.client, stats, slab_bytes)
        held = share.committed_slabs if member.pending is None else max(share.committed_slabs, member.pending.num_slabs)
        return EngineShare(
            member.devices,
            held=held,
            overhead=overhead,
            free=share.free_slabs,
            cached=share.idle_slabs,
            spare=share.spare_slabs,
            needed=share.needed_slabs,
            wanted=share.wanted_slabs,
            since_s=share.since_s,
            swap_s=swap_s,
            given_s=member.given_s,
            idle_models=idle,
            is_ready=member.pending is None and now_s >= member.retry_s,
            can_get=now_s >= member.get_s,
            is_home=member.is_home,
        )

    def _settle(self, member: _Member, share: DeviceShareFigures, now_s: float) -> None:
        """Note that the last command is complete, and wait before the next one, or before the next slabs, if it fell short."""
        if member.pending is None or share.last_resize != member.pending.number:
            return
        if share.committed_slabs < member.pending.num_slabs:
            member.get_s = now_s + _RETRY_GROWTH_S * 2 ** min(member.num_short, _MOST_DOUBLINGS)
            member.num_short += 1
        else:
            member.num_short = 0
            if share.committed_slabs > member.pending.num_slabs:
                member.retry_s = now_s + _RETRY_S
        member.pending = None

    def _idle_models(
        self, client: SharingEngine, stats: EngineStats, slab_bytes: int
    ) -> tuple[tuple[IdleModel, ...], float]:
        """Return the idle models of an engine in device memory, and the longest time that the return of one of its models takes."""
        idle, swap_s = [], 0.0
        for model in stats.models:
            if model.model_id in self.bases:
                continue
            if model.swap_in_s:
                self._return_s[model.model_id] = model.swap_in_s
            return_s = self._return_s.get(model.model_id, model.weight_bytes / _GUESSED_BYTES_PER_S)
            swap_s = max(swap_s, return_s)
            slabs = (model.device_bytes - model.kv_bytes) // slab_bytes
            if model.tier is Tier.DEVICE and slabs and not _is_busy(client, model):
                idle.append(
                    IdleModel(model.model_id, slabs, eviction_worth(self._uses.of(model.model_id), return_s, slabs))
                )
        return tuple(idle), swap_s

    def _member(self, client: SharingEngine) -> _Member:
        return next(member for member in self._members if member.client is client)


def _is_busy(client: SharingEngine, model: ModelFigures) -> bool:
    return bool(model.running or model.waiting or client.running(model.model_id))
