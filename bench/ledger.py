"""Keeps one line for each call of a benchmark, and sums up what became of the calls."""

import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

LATE_S = 0.3  # a call that takes longer has waited for a load
SLOW_S = 3.0


class Outcome(StrEnum):
    """What became of a call, if it did not end with an error status, whose name is then its outcome."""

    OK = "OK"
    WRONG = "WRONG"  # the answer of another call, or an incomplete one
    TWICE = "TWICE"  # more than one answer
    CUT = "CUT"  # a stream that began and ended with an error
    NO_ANSWER = "NO ANSWER"  # by the deadline
    HUNG = "HUNG"  # did not even end at its deadline


@dataclass(frozen=True, slots=True)
class Call:
    """One line of the ledger. `outcome`: an Outcome or an error status. `pods`: those that it was sent to, in this order."""

    number: int
    model: str
    sent_s: float
    seconds: float
    outcome: str
    pods: tuple[int, ...] = ()

    @property
    def ended_s(self) -> float:
        return self.sent_s + self.seconds


@dataclass(frozen=True, slots=True)
class Summary:
    """What a ledger shows. `late`: the share of the calls that took 0.3 s or longer."""

    num_calls: int
    outcomes: dict[str, int]
    late: float
    over_3s: int
    p50_s: float
    p95_s: float
    max_s: float

    @property
    def num_failed(self) -> int:
        return self.num_calls - self.outcomes.get(Outcome.OK, 0)

    def of(self, outcome: Outcome) -> int:
        return self.outcomes.get(outcome, 0)


def summarise(ledger: Sequence[Call]) -> Summary:
    seconds = sorted(call.seconds for call in ledger) or [0.0]
    percentiles = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else [seconds[0]] * 99
    return Summary(
        len(ledger),
        dict(Counter(call.outcome for call in ledger)),
        sum(call.seconds >= LATE_S for call in ledger) / max(1, len(ledger)),
        sum(call.seconds > SLOW_S for call in ledger),
        percentiles[49],
        percentiles[94],
        seconds[-1],
    )


def judged(call: Call, refused_models: Collection[str], refusals: Collection[str]) -> str:
    """Return the call's outcome against what was expected: a model that cannot be loaded must be refused with one of these statuses."""
    if call.model not in refused_models:
        return call.outcome
    if call.outcome in refusals:
        return Outcome.OK
    return Outcome.WRONG if call.outcome == Outcome.OK else call.outcome
