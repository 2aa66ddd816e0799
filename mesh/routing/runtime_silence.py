"""Notices that this pod's runtime reports its state and answers no requests, and ends the requests that it holds.

Silence alone proves nothing, because a long answer that is not streamed is silent too. The runtime's own state decides: a runtime that neither runs
nor queues a request of the models that are waited for has lost those requests.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from common.changes import Changes
from mesh.routing.attempts import Attempt
from mesh.routing.in_flight import InFlight
from mesh.types import RuntimeSnapshot

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_PATIENCE_S = 1.0
_FOREIGN_PATIENCE_S = 5.0  # a runtime without repertory.RuntimeState cannot be asked
_FOREIGN_FACTOR = 4.0  # of the mean time to the first byte
_REQUESTS = 3  # unanswered requests before the runtime counts as mute; after that, one until it has answered
_PAUSE_S = 5.0
_MAX_DOUBLINGS = 4


@dataclass(frozen=True, slots=True)
class Silence:
    """What is known of the runtime's answers. Times are on the monotonic clock.

    Attributes:
        strikes: how often the runtime was found mute since its last answer.
        struck_at_s: when it was found mute last.
        mute_until_s: requests go elsewhere until then. The next ones probe it.
    """

    strikes: int = 0
    struck_at_s: float = 0.0
    mute_until_s: float = 0.0

    def is_mute(self, now_s: float) -> bool:
        return now_s < self.mute_until_s

    def is_suspect(self, started_s: Sequence[float], answered_s: float, patience_s: float, now_s: float) -> bool:
        """Return whether enough requests have waited for too long. `started_s`: when each of those without an answer began; `answered_s`: the last answer."""
        overdue = sum(now_s - at_s >= patience_s for at_s in started_s)
        needed = 1 if self.strikes and answered_s < self.struck_at_s else _REQUESTS
        return overdue >= needed and now_s - answered_s >= patience_s and not self.is_mute(now_s)

    def struck(self, answered_s: float, now_s: float) -> "Silence":
        strikes = self.strikes if answered_s < self.struck_at_s else 0
        return Silence(strikes + 1, now_s, now_s + _PAUSE_S * 2 ** min(strikes, _MAX_DOUBLINGS))


def has_lost(snapshot: RuntimeSnapshot, model_ids: Sequence[str]) -> bool:
    """Return whether the runtime reports no running or queued request of any of the models."""
    busy = {model.model_id for model in snapshot.models if model.running or model.waiting}
    return busy.isdisjoint(model_ids)


class RuntimeSilence:
    """Watches the requests at this pod's runtime. `look` reads its current state; None if it does not answer or reports none.

    `is_foreign` returns whether the runtime reports no state at all. It then counts as mute after a silence that is long beside its usual answers.
    """

    def __init__(
        self,
        own_id: str,
        in_flight: InFlight,
        changes: Changes,
        *,
        look: Callable[[], Awaitable[RuntimeSnapshot | None]],
        is_foreign: Callable[[], bool],
    ) -> None:
        self._own_id = own_id
        self._in_flight = in_flight
        self._changes = changes
        self._look = look
        self._is_foreign = is_foreign
        self._silence = Silence()

    @property
    def is_mute(self) -> bool:
        return self._silence.is_mute(time.monotonic())

    async def run(self) -> None:
        was_mute = False
        while True:
            await asyncio.sleep(_TICK_S)
            if was_mute and not self.is_mute:
                self._changes.notify()  # requests may probe the runtime
            was_mute = self.is_mute
            if not was_mute and self._is_suspect() and await self._is_confirmed():
                self._strike()

    def _is_suspect(self) -> bool:
        started_s = [attempt.started_s for attempt in self._in_flight.unanswered(self._own_id)]
        answers = self._in_flight.answers(self._own_id)
        patience_s = _PATIENCE_S
        if self._is_foreign():
            if not answers.count:
                return False  # nothing is known of its usual answers
            patience_s = max(_FOREIGN_PATIENCE_S, _FOREIGN_FACTOR * answers.mean_s)
        answered_s = self._in_flight.answered_s(self._own_id)
        return self._silence.is_suspect(started_s, answered_s, patience_s, time.monotonic())

    async def _is_confirmed(self) -> bool:
        if self._is_foreign():
            return True
        asked_s = time.monotonic()
        waiting = self._in_flight.unanswered(self._own_id)
        snapshot = await self._look()
        # A runtime that does not answer this either is detected by the watch of its state.
        return (
            snapshot is not None
            and has_lost(snapshot, [attempt.model_id for attempt in waiting if _is_overdue(attempt, asked_s)])
            and self._is_suspect()
        )

    def _strike(self) -> None:
        self._silence = self._silence.struck(self._in_flight.answered_s(self._own_id), time.monotonic())
        num_lost = self._in_flight.lose(self._own_id, committed=False)
        logger.warning(
            "the runtime answers no requests: %d requests to it are ended, and none is sent to it for %g s",
            num_lost,
            self._silence.mute_until_s - self._silence.struck_at_s,
        )
        self._changes.notify()


def _is_overdue(attempt: Attempt, now_s: float) -> bool:
    return now_s - attempt.started_s >= _PATIENCE_S
