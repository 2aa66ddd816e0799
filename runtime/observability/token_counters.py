"""What is counted with each token: plain numbers in the event loop, made into Prometheus series only when somebody asks.

A prometheus_client histogram takes a lock and a Python call a bucket; at tens of thousands of tokens a second that is a tenth of the front's core.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenCounters:
    """One model's: tokens, and the time between them by bucket."""

    __slots__ = ("_bounds_s", "by_bucket", "gaps_s", "tokens")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self.tokens = 0
        self.by_bucket = [0] * (len(bounds_s) + 1)  # the last: over all bounds
        self.gaps_s = 0.0

    def gap(self, seconds: float) -> None:
        self.by_bucket[bisect_left(self._bounds_s, seconds)] += 1
        self.gaps_s += seconds


class ModelTokenCounters(Collector):
    """All models', as two metrics with one label."""

    def __init__(self, label: str, bounds_s: Sequence[float]) -> None:
        self._label = label
        self._bounds_s = tuple(bounds_s)
        self._names = [*map(str, self._bounds_s), "+Inf"]
        self._tallies: dict[str, TokenCounters] = {}

    def of(self, name: str) -> TokenCounters:
        return self._tallies.setdefault(name, TokenCounters(self._bounds_s))

    def forget(self, name: str) -> None:
        self._tallies.pop(name, None)

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens that were generated.", labels=[self._label])
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between a sequence's tokens.", labels=[self._label]
        )
        for name, tally in self._tallies.items():
            tokens.add_metric([name], tally.tokens)
            gaps.add_metric([name], list(zip(self._names, accumulate(tally.by_bucket), strict=True)), tally.gaps_s)
        return tokens, gaps
