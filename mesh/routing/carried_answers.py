"""Estimates how many calls that Envoy or workers carry to this pod's runtime wait for an answer, from their counts alone."""

from collections import Counter, deque
from collections.abc import Mapping

import msgspec

PATIENCE_S = 1.0


class CarriedCount(msgspec.Struct, frozen=True):
    """The calls of one series, which are those of one name to one load of a model's copy. `answered`: calls whose response has begun."""

    model_id: str
    begun: int
    active: int
    answered: int


class _Series(msgspec.Struct):
    """`begun`: the calls that had begun at each time of the last second, and at one time before. `num_given_up`: as in `give_up`."""

    begun: deque[tuple[float, int]]
    last: CarriedCount
    num_given_up: int = 0

    def add(self, count: CarriedCount, now_s: float) -> None:
        self.last = count
        self.begun.append((now_s, count.begun))
        while len(self.begun) > 1 and self.begun[1][0] <= now_s - PATIENCE_S:
            self.begun.popleft()

    def num_overdue(self, now_s: float) -> int:
        """Return the least number of active calls that are older than the patience: calls may end in another order than they began in."""
        at_s, begun = self.begun[0]
        if at_s > now_s - PATIENCE_S:
            return 0
        num_ended = self.last.begun - self.last.active
        return max(0, begun - num_ended - self.num_given_up)


class CarriedAnswers:
    """`overdue`: by model, the least number of calls that had waited for longer than `PATIENCE_S` when the counts were noted last.

    `answered_s`: when a call was known to be answered last, on the monotonic clock.
    """

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self.overdue: Mapping[str, int] = {}
        self.answered_s = 0.0

    def note(self, counts: Mapping[str, CarriedCount], now_s: float) -> None:
        """Take over all counts. A series that is not among them has ended, and one whose counts have decreased begins again."""
        before, self._series = self._series, {}
        overdue: Counter[str] = Counter()
        for name, count in counts.items():
            series = before.get(name)
            if series is None or count.begun < series.last.begun or count.answered < series.last.answered:
                series = _Series(deque(), CarriedCount(count.model_id, count.begun, count.active, 0))
            if count.answered > series.last.answered:
                self.answered_s = now_s
            series.add(count, now_s)
            self._series[name] = series
            if num_overdue := series.num_overdue(now_s):
                overdue[count.model_id] += num_overdue
        self.overdue = overdue

    def give_up(self) -> None:
        """Count the calls that are active now as lost: they may stay active for long, and say nothing about later calls."""
        for series in self._series.values():
            series.num_given_up = series.last.active
        self.overdue = {}
