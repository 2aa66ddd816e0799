"""Watches whether this pod has lost the store while other pods still have it, so that others may change what this pod knows.

While the store is unreachable for all pods, no registration can change, and what a pod knows stays true. Only durations are compared,
never the clocks of two machines.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from common.changes import Changes
from mesh.registry.instances import Instances
from mesh.registry.records import InstanceRecord
from mesh.store.protocol import Store

logger = logging.getLogger(__name__)

_EVERY_S = 1.0
_MIN_SILENCE_S = 4.0  # a watch that works is silent for less
_MIN_GRACE_S = 2.0
_NUM_ASKED = 5


class PeerGone(Exception):
    """The peer's host is reachable, and no process listens at the peer's address."""


class PeerContacts(Protocol):
    async def store_silence_s(self, pod: InstanceRecord) -> float | None:
        """Return the seconds since the store last answered another pod; None if that pod does not answer. Raises PeerGone."""


def has_store_elsewhere(own_silence_s: float, answers: Sequence[float | None], margin_s: float) -> bool:
    """Return whether another pod may have the store. `answers`: the silences that the other pods report, None if a pod does not answer.

    If other pods exist and none answers, this pod is the one that is cut off.
    """
    silences_s = [silence_s for silence_s in answers if silence_s is not None]
    if not silences_s:
        return bool(answers)
    return min(silences_s) + margin_s < own_silence_s


class StoreContact:
    """`ttl_s`: the lifetime of this pod's session in the store."""

    def __init__(
        self, store: Store, instances: Instances, peers: PeerContacts, changes: Changes, *, ttl_s: float
    ) -> None:
        self._store = store
        self._instances = instances
        self._peers = peers
        self._changes = changes
        self._margin_s = max(_MIN_SILENCE_S, ttl_s / 3)
        self._grace_s = max(_MIN_GRACE_S, ttl_s / 4)
        self._elsewhere_since_s: float | None = None
        self._unleased_since_s: float | None = None
        self.is_cut_off = False
        self.is_ready = True

    async def run(self) -> None:
        while True:
            now_s = time.monotonic()
            silence_s = self._store.silence_s()
            is_leased = self._instances.is_leased
            elsewhere = silence_s > self._margin_s and has_store_elsewhere(
                silence_s, await self._ask_peers(), self._margin_s
            )
            self._elsewhere_since_s = _since(self._elsewhere_since_s, now_s, elsewhere)
            # A pod whose store answers and that has no lease cannot write its record, so that other pods do not see it.
            unleased = not is_leased and silence_s <= self._margin_s
            self._unleased_since_s = _since(self._unleased_since_s, now_s, unleased)
            cut_off = not is_leased and self._has_lasted(self._elsewhere_since_s, now_s)
            ready = not cut_off and not self._has_lasted(self._unleased_since_s, now_s)
            if (cut_off, ready) != (self.is_cut_off, self.is_ready):
                self._log(cut_off)
                self.is_cut_off, self.is_ready = cut_off, ready
                self._changes.notify()
            await asyncio.sleep(_EVERY_S)

    def _has_lasted(self, since_s: float | None, now_s: float) -> bool:
        return since_s is not None and now_s - since_s >= self._grace_s

    def _log(self, cut_off: bool) -> None:
        if cut_off:
            logger.error(
                "this pod has lost the store and other pods may have it: requests are refused until it is back"
            )
        elif self.is_cut_off:
            logger.warning("the store answers this pod again, or no other pod has it: requests are accepted")

    async def _ask_peers(self) -> list[float | None]:
        # Also those whose runtimes do not answer: they take registrations.
        pods = [pod for pod_id, pod in self._instances.items() if pod_id != self._instances.own_id]
        pods = [pod for pod in pods if pod.http_address and not pod.shutting_down]
        return [
            answer
            for answer in await asyncio.gather(*(self._ask(pod) for pod in pods[:_NUM_ASKED]))
            if not isinstance(answer, PeerGone)
        ]

    async def _ask(self, pod: InstanceRecord) -> float | PeerGone | None:
        try:
            return await self._peers.store_silence_s(pod)
        except PeerGone as gone:
            return gone


def _since(since_s: float | None, now_s: float, holds: bool) -> float | None:
    return (since_s if since_s is not None else now_s) if holds else None
