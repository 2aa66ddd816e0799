"""Measures placement: `python -m bench.placement [--seconds 60] [--plot FILE.svg]`.

Four pods with room for 12 models each, 100 names by Zipf 0.9, 70 calls a second, loads of 0.5 s; once with steady popularity and once with the
names shuffled every 20 s.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from bench.caller import Caller, Traffic, zipf
from bench.fleet import fleet, register
from bench.ledger import LATE_S, Call, Outcome, Summary, summarise
from bench.svg import Series, line_chart

_MODELS = [f"model{number}" for number in range(100)]
_RATE = 70.0
_SHUFFLED_S = 20.0
_PEER = ("ModelMesh, steady", "84 %", "15 %", "522", "592 ms")


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    summary: Summary
    num_loads: int
    ledger: Sequence[Call]

    def row(self) -> tuple[str, ...]:
        answered = self.summary.of(Outcome.OK) / self.summary.num_calls
        return (
            self.name,
            f"{answered:.1%}".replace("%", " %"),
            f"{self.summary.late:.1%}".replace("%", " %"),
            str(self.num_loads),
            f"{self.summary.p95_s * 1000:.0f} ms",
        )


def measure(name: str, seconds: float, shuffled_every_s: float | None) -> Result:
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder), num_pods=4, models_per_pod=12, load_s=0.5) as mesh,
    ):
        uvloop.run(register(mesh.pods[0], _MODELS))
        traffic = Traffic(_MODELS, zipf(len(_MODELS), 0.9, shuffled_every_s=shuffled_every_s), _RATE, seconds)
        ledger = uvloop.run(Caller(mesh.pods).run(traffic))
        return Result(name, summarise(ledger), mesh.num_loads(), ledger)


def late_share(ledger: Sequence[Call], seconds: float, every_s: float = 2.0) -> list[tuple[float, float]]:
    """Return the share of calls that waited for a load, in percent, for each interval."""
    points = []
    for step in range(int(seconds / every_s)):
        calls = [call for call in ledger if step * every_s <= call.sent_s < (step + 1) * every_s]
        late = sum(call.seconds >= LATE_S for call in calls)
        points.append(((step + 0.5) * every_s, 100 * late / max(1, len(calls))))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.placement")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    cases = (("steady", None), ("shuffled every 20 s", _SHUFFLED_S))
    results = [measure(name, arguments.seconds, every_s) for name, every_s in cases]
    rows = [("case", "answered", "waited for a load", "loads", "p95"), *(result.row() for result in results), _PEER]
    for row in rows:
        print(" | ".join(row))
    if arguments.plot is not None:
        series = [Series(result.name, late_share(result.ledger, arguments.seconds)) for result in results]
        arguments.plot.write_text(line_chart(series, "seconds", "calls that waited for a load, %"))


if __name__ == "__main__":
    main()
