"""Provides metrics that need one or two dictionary look-ups per call and no lock, because everything runs on the pod's event loop."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

Series = TypeVar("Series")


class _Labelled(Generic[Series]):
    """Series by the values of their labels. `name` has no suffix such as `_total`."""

    def __init__(self, name: str, about: str, labels: tuple[str, ...] = ()) -> None:
        self._name = name
        self._about = about
        self._labels = labels
        self._series: dict[tuple[str, ...], Series] = {}

    def first_labels(self) -> set[str]:
        """Return the values that the first label has."""
        return {labels[0] for labels in self._series}

    def drop(self, first_label: str) -> None:
        """Remove the series whose first label has this value."""
        self._series = {labels: series for labels, series in self._series.items() if labels[0] != first_label}


class LabelledCounter(_Labelled[int]):
    def inc(self, *labels: str, by: int = 1) -> None:
        self._series[labels] = self._series.get(labels, 0) + by

    def family(self) -> Metric:
        family = CounterMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in self._series.items():
            family.add_metric(labels, value)
        return family


class LabelledGauge(_Labelled[float]):
    def set(self, value: float, *labels: str) -> None:
        self._series[labels] = value

    def change(self, by: int, *labels: str) -> None:
        self._series[labels] = self._series.get(labels, 0) + by

    def value(self, *labels: str) -> float:
        return self._series.get(labels, 0)

    def family(self) -> Metric:
        family = GaugeMetricFamily(self._name, self._about, labels=self._labels)
        for labels, value in self._series.items():
            family.add_metric(labels, value)
        return family


class LabelledHistogram(_Labelled[tuple[list[int], list[float]]]):
    """A histogram with a fixed list of upper bounds. A series has the number of values in each bucket, and their sum."""

    def __init__(self, name: str, about: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()) -> None:
        super().__init__(name, about, labels)
        self._bounds = bounds
        if not labels:
            self._add_series(())

    def observe(self, value: float, *labels: str) -> None:
        counts, total = self._series.get(labels) or self._add_series(labels)
        counts[bisect_left(self._bounds, value)] += 1
        total[0] += value

    def family(self) -> Metric:
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
