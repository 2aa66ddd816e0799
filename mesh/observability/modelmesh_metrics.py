"""ModelMesh's Prometheus metrics under its names, types, labels and buckets, so that its dashboards and alerts keep working."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from mesh.observability.metric_series import Families, LabelledHistogram

_SECOND_MS, _MINUTE_MS, _HOUR_MS, _DAY_MS = 1_000, 60_000, 3_600_000, 86_400_000
_DURATIONS_MS = (0.5, 1, 2, 5, 10, 20, 50, 75, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000, 120000, 300000)
_AGES_MS = (
    *(30 * _SECOND_MS, 5 * _MINUTE_MS, 15 * _MINUTE_MS),
    *(_HOUR_MS, 4 * _HOUR_MS, 12 * _HOUR_MS),
    *(_DAY_MS, 7 * _DAY_MS, 30 * _DAY_MS, 90 * _DAY_MS),
)
_MODEL_BYTES = tuple(256 * 1024 * 4**power for power in range(8))
_MESSAGE_BYTES = tuple(128 * 4**power for power in range(8))
_BY_CALL = ("method", "code")

_POD_GAUGES = {
    "modelmesh_instance_capacity_bytes": "Capacity for loaded models in bytes",
    "modelmesh_instance_used_bytes": "Size of the loaded models in bytes",
    "modelmesh_instance_used_bps": "Used capacity in basis points",
    "modelmesh_instance_models_total": "Number of models loaded on this pod",
    "modelmesh_instance_lru_seconds": "Unix time in seconds at which the least recently used model was last used",
    "modelmesh_instance_lru_age_seconds": "Seconds since the least recently used model was last used",
}
_MESH_GAUGES = {
    "modelmesh_models_managed_total": "Number of registered models",
    "modelmesh_models_loaded_total": "Number of models with a loaded copy",
    "modelmesh_models_with_failure_total": "Number of models with a failed load",
}


@dataclass(frozen=True, slots=True)
class PodFigures:
    """The pod's state at a scrape. Only the pod that `is_leader` exports the mesh-wide figures, so that a sum over pods is right."""

    capacity_bytes: int
    used_bytes: int
    num_models: int
    lru_ms: int
    now_ms: int
    models_managed: int
    models_loaded: int
    models_failed: int
    is_leader: bool


class BareCounter:
    """A counter without the suffix `_total`, which prometheus_client always adds and ModelMesh never does."""

    def __init__(self, name: str, about: str) -> None:
        self._name = name
        self._about = about
        self._value = 0

    def inc(self) -> None:
        self._value += 1

    def text(self) -> bytes:
        return (
            f"# HELP {self._name} {self._about}\n# TYPE {self._name} counter\n{self._name} {self._value}.0\n".encode()
        )


class ModelMeshMetrics:
    """Every metric that ModelMesh exports to Prometheus. Times are in milliseconds and sizes in bytes."""

    def __init__(self) -> None:
        def times(name: str, about: str, labels: tuple[str, ...] = ()) -> LabelledHistogram:
            return LabelledHistogram(f"modelmesh_{name}_milliseconds", about, _DURATIONS_MS, labels)

        self.api_request = times("api_request", "Duration of a caller's request", _BY_CALL)
        self.invoke_model = times("invoke_model", "Duration of a call of this pod's runtime", _BY_CALL)
        self.request_size = LabelledHistogram(
            "modelmesh_request_size_bytes", "Size of a request's messages", _MESSAGE_BYTES, _BY_CALL
        )
        self.response_size = LabelledHistogram(
            "modelmesh_response_size_bytes", "Size of a response's messages", _MESSAGE_BYTES, _BY_CALL
        )
        self.cache_miss = times("cache_miss", "Time that a request waited for its model to be loaded")
        self.request_queue_delay = times("req_queue_delay", "Time that a request waited for a free slot of its model")
        self.load = times("loadmodel", "Duration of a load")
        self.load_queue_delay = times("loading_queue_delay", "Time that a load waited for other loads")
        self.model_sizing = times("model_sizing", "Time that the runtime took to answer a loaded model's size")
        self.unload = times("unloadmodel", "Duration of an unload")
        self.age_at_eviction = LabelledHistogram(
            "modelmesh_age_at_eviction_milliseconds", "Time since an evicted model was last used", _AGES_MS
        )
        self.loaded_model_size = LabelledHistogram(
            "modelmesh_loaded_model_size_bytes", "Size of a loaded model as the runtime reports it", _MODEL_BYTES
        )
        self.load_failure = BareCounter("modelmesh_loadmodel_failure", "Failed loads")
        self.unload_failure = BareCounter("modelmesh_unloadmodel_failure", "Unloads that were given up")
        self.unload_attempt_failure = BareCounter("modelmesh_unloadmodel_attempt_failure", "Failed attempts to unload")

    def text(self, figures: PodFigures) -> bytes:
        """Return all series in Prometheus' text format."""
        counters = (self.load_failure, self.unload_failure, self.unload_attempt_failure)
        return generate_latest(Families(self._families(figures))) + b"".join(counter.text() for counter in counters)

    def _families(self, figures: PodFigures) -> Iterator[Metric]:
        for histogram in vars(self).values():
            if isinstance(histogram, LabelledHistogram):
                yield histogram.family()
        yield from _gauges(_POD_GAUGES, _pod_values(figures))
        if figures.is_leader:
            values = (figures.models_managed, figures.models_loaded, figures.models_failed)
            yield from _gauges(_MESH_GAUGES, values)


def _pod_values(figures: PodFigures) -> tuple[float, ...]:
    """Return the values of _POD_GAUGES in their order."""
    used = figures.used_bytes / figures.capacity_bytes if figures.capacity_bytes else 0.0
    lru_ms, age_ms = (figures.lru_ms, figures.now_ms - figures.lru_ms) if figures.num_models else (0, 0)
    return (
        figures.capacity_bytes,
        figures.used_bytes,
        round(used * 10_000),
        figures.num_models,
        lru_ms / 1000,
        age_ms / 1000,
    )


def _gauges(names: dict[str, str], values: Iterable[float]) -> Iterator[Metric]:
    for (name, about), value in zip(names.items(), values, strict=True):
        yield GaugeMetricFamily(name, about, value=value)
