"""Notices that this pod's runtime reports its state and answers no requests, and ends the requests that it holds.

Silence alone proves nothing, because a long answer that is not streamed is silent too. The runtime's own state decides: a runtime that neither runs
nor queues a request of the models that are waited for has lost those requests.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from common.changes import Changes
from mesh.routing.attempts import Attempt
from mesh.routing.carried_answers import PATIENCE_S, CarriedAnswers
from mesh.routing.in_flight import InFlight
from mesh.types import RuntimeSnapshot

logger = logging.getLogger(__name__)

_TICK_S = 0.1
_LOOK_S = 1.5  # a runtime that also reports no state for this long is mute
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

    def is_doubted(self, answered_s: float) -> bool:
        """Return whether nothing was answered since the runtime was found mute. `answered_s`: the last answer."""
        return self.strikes > 0 and answered_s < self.struck_at_s

    def is_suspect(self, started_s: Sequence[float], answered_s: float, patience_s: float, now_s: float) -> bool:
        """Return whether enough requests have waited for too long. `started_s`: when each of those without an answer began; `answered_s`: the last answer."""
        overdue = sum(now_s - at_s >= patience_s for at_s in started_s)
        needed = 1 if self.is_doubted(answered_s) else _REQUESTS
        return overdue >= needed and now_s - answered_s >= patience_s and not self.is_mute(now_s)

    def struck(self, answered_s: float, now_s: float) -> "Silence":
        strikes = self.strikes if answered_s < self.struck_at_s else 0
        return Silence(strikes + 1, now_s, now_s + _PAUSE_S * 2 ** min(strikes, _MAX_DOUBLINGS))


def has_lost(snapshot: RuntimeSnapshot, model_ids: Sequence[str]) -> bool:
    """Return whether the runtime reports no running or queued request of any of the models."""
    busy = {model.model_id for model in snapshot.models if model.running or model.waiting}
    return busy.isdisjoint(model_ids)


class RuntimeSilence:
    """Watches the requests at this pod's runtime. `look` reads its current state; None if it does not answer.

    `is_foreign` returns whether the runtime reports no state at all. It then counts as mute after a silence that is long beside its usual answers.
    `carried`: what is known of calls that reach the runtime past this process, None if there are none. `is_idle` returns whether a model is loaded
    while the runtime's last state has no request of it, and none waits for it.
    """

    def __init__(
        self,
        own_id: str,
        in_flight: InFlight,
        changes: Changes,
        *,
        look: Callable[[], Awaitable[RuntimeSnapshot | None]],
        is_foreign: Callable[[], bool],
        carried: CarriedAnswers | None = None,
        is_idle: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._own_id = own_id
        self._in_flight = in_flight
        self._changes = changes
        self._look = look
        self._is_foreign = is_foreign
        self._carried = carried or CarriedAnswers()
        self._is_idle = is_idle
        self._silence = Silence()

    @property
    def is_mute(self) -> bool:
        return self._silence.is_mute(time.monotonic())

    @property
    def is_doubted(self) -> bool:
        """Return whether the runtime was mute and has not answered a request since. Only a few requests may go to it, as probes."""
        return self.is_mute or self._silence.is_doubted(self._answered_s())

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
        patience_s = PATIENCE_S
        if self._is_foreign():
            if not answers.count:
                return False  # nothing is known of its usual answers
            patience_s = max(_FOREIGN_PATIENCE_S, _FOREIGN_FACTOR * answers.mean_s)
        else:
            started_s += [-math.inf] * sum(self._overdue_carried().values())
        return self._silence.is_suspect(started_s, self._answered_s(), patience_s, time.monotonic())

    def _answered_s(self) -> float:
        return max(self._in_flight.answered_s(self._own_id), self._carried.answered_s)

    def _overdue_carried(self) -> dict[str, int]:
        """Return the overdue calls past this process by model, without those that this process has got since: the runtime refused them."""
        return {
            model_id: num_left
            for model_id, num_overdue in self._carried.overdue.items()
            if self._is_idle(model_id) and (num_left := num_overdue - self._in_flight.num_of(model_id)) > 0
        }

    async def _is_confirmed(self) -> bool:
        if self._is_foreign():
            return True
        asked_s = time.monotonic()
        waiting = [
            attempt.model_id for attempt in self._in_flight.unanswered(self._own_id) if _is_overdue(attempt, asked_s)
        ]
        waiting += self._overdue_carried()
        try:
            async with asyncio.timeout(_LOOK_S):
                snapshot = await self._look()
        except TimeoutError:
            snapshot = None
        return (snapshot is None or has_lost(snapshot, waiting)) and self._is_suspect()

    def _strike(self) -> None:
        self._silence = self._silence.struck(self._answered_s(), time.monotonic())
        num_lost, num_carried = self._in_flight.lose(self._own_id, committed=False), sum(self._carried.overdue.values())
        self._carried.give_up()
        logger.warning(
            "the runtime answers no requests: %d requests to it are ended, %d or more past this process wait on, and none is sent to it for %g s",
            num_lost,
            num_carried,
            self._silence.mute_until_s - self._silence.struck_at_s,
        )
        self._changes.notify()


def _is_overdue(attempt: Attempt, now_s: float) -> bool:
    return now_s - attempt.started_s >= PATIENCE_S
