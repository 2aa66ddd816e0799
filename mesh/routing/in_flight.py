"""Keeps the attempts in flight by target, so that the loss of a target ends them, and when each target answered last."""

import time
from collections.abc import Callable

import msgspec

from mesh.routing.attempts import Attempt, Outcome

_NEW_WEIGHT = 0.1  # of the newest answer in the mean


class Answers(msgspec.Struct, frozen=True):
    """What a target has answered. `mean_s`: moving mean of the time to the first byte. `last_s`: the last answer, on the monotonic clock."""

    count: int = 0
    mean_s: float = 0.0
    last_s: float = 0.0

    def with_one(self, seconds: float, now_s: float) -> "Answers":
        weight = max(_NEW_WEIGHT, 1 / (self.count + 1))
        return Answers(self.count + 1, self.mean_s + weight * (seconds - self.mean_s), now_s)


class InFlight:
    def __init__(self) -> None:
        self._by_target: dict[str, dict[Attempt, None]] = {}
        self._answers: dict[str, Answers] = {}
        self._listeners: list[Callable[[str, bool], None]] = []

    def listen(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener` with the target and `committed` of each call of `lose`."""
        self._listeners.append(listener)

    def add(self, attempt: Attempt) -> None:
        self._by_target.setdefault(attempt.target.instance_id, {})[attempt] = None

    def remove(self, attempt: Attempt) -> None:
        instance_id = attempt.target.instance_id
        at_target = self._by_target.get(instance_id, {})
        at_target.pop(attempt, None)
        if not at_target:
            self._by_target.pop(instance_id, None)
        # A refusal is an answer too.
        if not attempt.is_lost and attempt.outcome is not Outcome.ABANDONED:
            self._answers[instance_id] = self.answers(instance_id).with_one(attempt.waited_s, time.monotonic())

    def targets(self) -> list[str]:
        """Return the instance ids that attempts are in flight to."""
        return list(self._by_target)

    def oldest(self, instance_id: str) -> Attempt | None:
        return next(iter(self._by_target.get(instance_id, {})), None)

    def unanswered(self, instance_id: str) -> list[Attempt]:
        """Return the attempts whose response has not begun."""
        return [attempt for attempt in self._by_target.get(instance_id, {}) if attempt.first_byte_s is None]

    def num_of(self, model_id: str) -> int:
        """Return the number of attempts of a model at any targets."""
        return sum(attempt.model_id == model_id for attempts in self._by_target.values() for attempt in attempts)

    def answers(self, instance_id: str) -> Answers:
        """Return what the target has answered to attempts that have ended."""
        return self._answers.get(instance_id, Answers())

    def answered_s(self, instance_id: str) -> float:
        """Return when the target answered last, by the beginning of a response too."""
        begun = (attempt.first_byte_s or 0.0 for attempt in self._by_target.get(instance_id, {}))
        return max(self.answers(instance_id).last_s, *begun, 0.0)

    def lose(self, instance_id: str, *, committed: bool) -> int:
        """End the attempts at a target, and return their number. Attempts whose response has begun are kept unless `committed`."""
        lost = [attempt for attempt in self._by_target.get(instance_id, {}) if committed or not attempt.is_committed]
        for attempt in lost:
            attempt.lose()
        for listener in self._listeners:
            listener(instance_id, committed)
        return len(lost)
