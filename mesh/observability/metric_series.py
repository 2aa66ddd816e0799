"""Metrics that cost a call one or two dictionary look-ups and no lock: everything runs on the pod's event loop."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric


class LabelledHistogram:
    """A histogram with a fixed list of upper bounds, without labels or with the given ones."""

    def __init__(self, name: str, about: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()) -> None:
        self._name = name
        self._about = about
        self._bounds = bounds
        self._labels = labels
        # By label values: the number of values in each bucket, and their sum.
        self._series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}
        if not labels:
            self._add_series(())

    def observe(self, value: float, *labels: str) -> None:
        counts, total = self._series.get(labels) or self._add_series(labels)
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def family(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self._name, self._about, labels=self._labels)
        bounds = (*map(str, map(float, self._bounds)), "+Inf")
        for labels, (counts, total) in self._series.items():
            family.add_metric(labels, list(zip(bounds, accumulate(counts), strict=True)), total[0])
        return family

    def _add_series(self, labels: tuple[str, ...]) -> tuple[list[int], list[float]]:
        series = [0] * (len(self._bounds) + 1), [0.0]
        self._series[labels] = series
        return series


class Families:
    """Families in the form that `generate_latest` takes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
