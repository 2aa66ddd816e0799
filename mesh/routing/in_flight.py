"""Keeps the attempts in flight by target, so that the loss of a target ends them."""

from mesh.routing.attempts import Attempt


class InFlight:
    def __init__(self) -> None:
        self._by_target: dict[str, dict[Attempt, None]] = {}

    def add(self, attempt: Attempt) -> None:
        self._by_target.setdefault(attempt.target.instance_id, {})[attempt] = None

    def remove(self, attempt: Attempt) -> None:
        at_target = self._by_target.get(attempt.target.instance_id, {})
        at_target.pop(attempt, None)
        if not at_target:
            self._by_target.pop(attempt.target.instance_id, None)

    def targets(self) -> list[str]:
        """Return the instance ids that attempts are in flight to."""
        return list(self._by_target)

    def oldest(self, instance_id: str) -> Attempt | None:
        return next(iter(self._by_target.get(instance_id, {})), None)

    def lose(self, instance_id: str, *, committed: bool) -> int:
        """End the attempts at a target, and return their number. Attempts whose response has begun are kept unless `committed`."""
        lost = [attempt for attempt in self._by_target.get(instance_id, {}) if committed or not attempt.is_committed]
        for attempt in lost:
            attempt.lose()
        return len(lost)
