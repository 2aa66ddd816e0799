"""Counters that are updated for every token: plain numbers, converted to Prometheus series at a scrape.

A prometheus_client histogram takes a lock and makes one Python call per bucket, which costs a tenth of a core at tens of thousands of tokens per
second.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenCounters:
    """The generated tokens of one model, and the histogram of the time between them."""

    __slots__ = ("_bounds_s", "by_bucket", "gaps_s", "tokens")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self.tokens = 0
        self.by_bucket = [0] * (len(bounds_s) + 1)  # the last bucket is above all bounds
        self.gaps_s = 0.0

    def gap(self, seconds: float) -> None:
        self.by_bucket[bisect_left(self._bounds_s, seconds)] += 1
        self.gaps_s += seconds


class ModelTokenCounters(Collector):
    """Exports the counters of all models as two metrics that are labelled with the model's name."""

    def __init__(self, label: str, bounds_s: Sequence[float]) -> None:
        self._label = label
        self._bounds_s = tuple(bounds_s)
        self._names = [*map(str, self._bounds_s), "+Inf"]
        self._counters: dict[str, TokenCounters] = {}

    def of(self, name: str) -> TokenCounters:
        return self._counters.setdefault(name, TokenCounters(self._bounds_s))

    def forget(self, name: str) -> None:
        self._counters.pop(name, None)

    def collect(self) -> Iterable[Metric]:
        tokens = CounterMetricFamily("vllm:generation_tokens", "Number of generated tokens.", labels=[self._label])
        gaps = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds",
            "Time between two tokens of a sequence in seconds.",
            labels=[self._label],
        )
        for name, counters in self._counters.items():
            tokens.add_metric([name], counters.tokens)
            gaps.add_metric(
                [name], list(zip(self._names, accumulate(counters.by_bucket), strict=True)), counters.gaps_s
            )
        return tokens, gaps
