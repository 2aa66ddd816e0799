"""Notices within about two seconds that another pod does not answer, avoids it, and ends the requests that it had.

Pods with requests in flight are probed over HTTP, so a frozen or cut-off pod is detected although its connections stay open.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from common.changes import Changes
from mesh.routing.attempts import Attempt
from mesh.routing.in_flight import InFlight

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_PATIENCE_S = 0.4  # a request that is answered sooner causes no probe
_EVERY_S = 0.5
_FAILURES_TO_OPEN = 2
_MAX_PAUSE_S = 5.0


class ProbeResult(StrEnum):
    ANSWERED = "answered"
    SILENT = "silent"
    REFUSED = "refused"  # the host answers that nothing listens there


class PeerProbe(Protocol):
    async def probe(self, http_address: str) -> ProbeResult:
        """Return within a second whether a pod answers."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """The health of one pod.

    Attributes:
        failures: probes that failed in a row.
        failing_since_s: when the first of them ended, on the monotonic clock.
        probe_at_s: the earliest time of the next probe.
    """

    failures: int = 0
    failing_since_s: float = 0.0
    probe_at_s: float = 0.0

    @property
    def is_open(self) -> bool:
        """The pod counts as lost: requests to it are ended."""
        return self.failures >= _FAILURES_TO_OPEN

    @property
    def is_usable(self) -> bool:
        """New requests may go to the pod."""
        return not self.failures

    def after(self, result: ProbeResult, now_s: float) -> "Circuit":
        if result is ProbeResult.ANSWERED:
            return Circuit(probe_at_s=now_s + _EVERY_S)
        failures = _FAILURES_TO_OPEN if result is ProbeResult.REFUSED and not self.failures else self.failures + 1
        pause_s = 0.0 if failures < _FAILURES_TO_OPEN else min(_MAX_PAUSE_S, _EVERY_S * 2 ** (failures - 2))
        return Circuit(failures, self.failing_since_s if self.failures else now_s, now_s + pause_s)

    def suspected(self) -> "Circuit":
        """Return the circuit with the next probe due now, unless it is open already."""
        return self if self.is_open else Circuit(self.failures, self.failing_since_s, 0.0)


class PeerHealth:
    """One circuit per pod.

    `address_of` returns the HTTP address to probe a pod at, empty if it must not be probed, None if it has no record. `gone_after_s`: how long a
    pod that has a record may be silent before responses that have begun are ended, too.
    """

    def __init__(
        self,
        probe: PeerProbe,
        in_flight: InFlight,
        changes: Changes,
        *,
        address_of: Callable[[str], str | None],
        gone_after_s: float,
    ) -> None:
        self._probe = probe
        self._in_flight = in_flight
        self._changes = changes
        self._address_of = address_of
        self._gone_after_s = gone_after_s
        self._circuits: dict[str, Circuit] = {}
        self._suspects: set[str] = set()
        self._probing: dict[str, asyncio.Task[None]] = {}

    def is_usable(self, instance_id: str) -> bool:
        circuit = self._circuits.get(instance_id)
        return circuit is None or circuit.is_usable

    def suspect(self, instance_id: str) -> None:
        """Probe a pod soon, because a request to it failed."""
        self._suspects.add(instance_id)
        if (circuit := self._circuits.get(instance_id)) is not None:
            self._circuits[instance_id] = circuit.suspected()

    async def run(self) -> None:
        try:
            while True:
                self._start_probes(time.monotonic())
                await asyncio.sleep(_TICK_S)
        finally:
            for task in self._probing.values():
                task.cancel()

    def _start_probes(self, now_s: float) -> None:
        failing = {instance_id for instance_id, circuit in self._circuits.items() if circuit.failures}
        for instance_id in {*self._in_flight.targets(), *failing, *self._suspects} - self._probing.keys():
            circuit = self._circuits.get(instance_id, Circuit())
            oldest = self._in_flight.oldest(instance_id)
            is_due = circuit.failures or instance_id in self._suspects or _is_overdue(oldest, now_s)
            address = self._address_of(instance_id)
            if address is None and oldest is not None:
                address = oldest.target.http_address
            if not address:
                # Nothing waits for the pod, or it must not be probed.
                self._circuits.pop(instance_id, None)
                self._suspects.discard(instance_id)
            elif is_due and circuit.probe_at_s <= now_s and not (oldest is not None and oldest.target.local):
                self._probing[instance_id] = asyncio.create_task(self._check(instance_id, address))

    async def _check(self, instance_id: str, address: str) -> None:
        try:
            result = await self._probe.probe(address)
        finally:
            del self._probing[instance_id]
        now_s = time.monotonic()
        self._suspects.discard(instance_id)
        before = self._circuits.get(instance_id, Circuit())
        circuit = self._circuits[instance_id] = before.after(result, now_s)
        if circuit.is_usable != before.is_usable:
            self._changes.notify()
        if circuit.is_usable and not before.is_usable:
            logger.info("pod %s answers again", instance_id)
        if not circuit.is_open:
            return
        has_record = self._address_of(instance_id) is not None
        is_gone = not has_record or now_s - circuit.failing_since_s >= self._gone_after_s
        num_lost = self._in_flight.lose(instance_id, committed=is_gone)
        if num_lost or not before.is_open:
            logger.warning("pod %s does not answer (%s): %d requests to it are ended", instance_id, result, num_lost)


def _is_overdue(attempt: Attempt | None, now_s: float) -> bool:
    return attempt is not None and now_s - attempt.started_s >= _PATIENCE_S
