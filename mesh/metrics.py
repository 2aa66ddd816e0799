"""Prometheus metrics of one pod: requests, queues, loads and evictions, under our names and under those of ModelMesh's dashboards.

The series of a model are dropped once it is no longer registered.
"""

from collections import Counter as Multiset
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mesh.registry.registration import name_in

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MILLISECONDS = (0.5, 1, 2, 5, 10, 20, 50, 75, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 60000, 120000, 300000)


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


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._known: dict[str, set[tuple[Counter | Gauge | Histogram, tuple[str, ...]]]] = {}
        self._busy: Multiset[str] = (
            Multiset()
        )  # series with a gauge above 0 must not be dropped: it will be decremented
        label = ("model_name",)  # the same label as in the runtime's metrics
        self._requests = Counter(
            "repertory_mesh_requests",
            "Requests by model, protocol (grpc or http) and final status code",
            ("model_name", "carrier", "code"),
            registry=self._registry,
        )
        self._first_byte = Histogram(
            "repertory_mesh_time_to_first_byte_seconds",
            "Seconds from the arrival of a request to the first byte or message of its response, including loading",
            label,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._held = Gauge(
            "repertory_mesh_held_requests",
            "Requests waiting for their model to be loaded",
            label,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "repertory_mesh_in_flight_requests",
            "Requests forwarded to a copy and not finished",
            label,
            registry=self._registry,
        )
        self._loads = Counter(
            "repertory_mesh_loads",
            "Model loads by outcome (loaded or failed)",
            ("model_name", "outcome"),
            registry=self._registry,
        )
        self._load_seconds = Histogram(
            "repertory_mesh_load_seconds",
            "Duration of successful model loads in seconds",
            label,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._evictions = Counter(
            "repertory_mesh_evictions",
            "Models unloaded to free memory for another model",
            label,
            registry=self._registry,
        )
        self._mm_load_ms = Histogram(
            "modelmesh_loadmodel_milliseconds",
            "Duration of model loads in milliseconds (ModelMesh's name)",
            buckets=_MILLISECONDS,
            registry=self._registry,
        )
        self._mm_request_ms = Histogram(
            "modelmesh_api_request_milliseconds",
            "Duration of requests in milliseconds (ModelMesh's name)",
            ("method", "code"),
            buckets=_MILLISECONDS,
            registry=self._registry,
        )
        self._mm_failures = Gauge(
            "modelmesh_loadmodel_failure", "Number of failed model loads (ModelMesh's name)", registry=self._registry
        )
        self._pod = {
            name: Gauge(f"modelmesh_{name}", text, registry=self._registry)
            for name, text in (
                ("instance_capacity_bytes", "Capacity for loaded models in bytes"),
                ("instance_used_bytes", "Size of the loaded models in bytes"),
                ("instance_used_bps", "Used capacity in basis points"),
                ("instance_models_total", "Number of models loaded on this pod"),
                ("instance_lru_seconds", "Unix time in seconds at which the least recently used model was last used"),
                ("instance_lru_age_seconds", "Seconds since the least recently used model was last used"),
            )
        }
        self._whole = CollectorRegistry()
        self._mesh = {
            name: Gauge(f"modelmesh_{name}", text, registry=self._whole)
            for name, text in (
                ("models_managed_total", "Number of registered models"),
                ("models_loaded_total", "Number of models with a loaded copy"),
                ("models_with_failure_total", "Number of models with a failed load"),
            )
        }

    def request(self, model_id: str, carrier: str, code: str, method: str, seconds: float) -> None:
        """Count a finished request. `carrier` is grpc or http; `model_id` is empty if the request names no model."""
        self._counter(self._requests, model_id, carrier, code)
        self._mm_request_ms.labels(method, code).observe(seconds * 1000)

    def first_byte(self, model_id: str, seconds: float) -> None:
        self._observe(self._first_byte, model_id, seconds)

    def held(self, model_id: str, change: int) -> None:
        self._level(self._held, model_id, change)

    def in_flight(self, model_id: str, change: int) -> None:
        self._level(self._in_flight, model_id, change)

    def loaded(self, model_id: str, seconds: float) -> None:
        self._counter(self._loads, model_id, "loaded")
        self._observe(self._load_seconds, model_id, seconds)
        self._mm_load_ms.observe(seconds * 1000)

    def load_failed(self, model_id: str) -> None:
        self._counter(self._loads, model_id, "failed")
        self._mm_failures.inc()

    def evicted(self, model_id: str) -> None:
        self._counter(self._evictions, model_id)

    def text(self, figures: PodFigures, is_registered: Callable[[str], bool]) -> bytes:
        """Return all series in Prometheus' text format, after dropping those of models that are no longer registered."""
        for name in [name for name in self._known if name and not self._busy[name] and not is_registered(name)]:
            self._drop(name)
        used = figures.used_bytes / figures.capacity_bytes if figures.capacity_bytes else 0.0
        values = {
            "instance_capacity_bytes": figures.capacity_bytes,
            "instance_used_bytes": figures.used_bytes,
            "instance_used_bps": round(used * 10_000),
            "instance_models_total": figures.num_models,
            "instance_lru_seconds": figures.lru_ms / 1000 if figures.num_models else 0,
            "instance_lru_age_seconds": (figures.now_ms - figures.lru_ms) / 1000 if figures.num_models else 0,
        }
        for name, value in values.items():
            self._pod[name].set(value)
        text = generate_latest(self._registry)
        if not figures.is_leader:
            return text
        self._mesh["models_managed_total"].set(figures.models_managed)
        self._mesh["models_loaded_total"].set(figures.models_loaded)
        self._mesh["models_with_failure_total"].set(figures.models_failed)
        return text + generate_latest(self._whole)

    def _counter(self, family: Counter, model_id: str, *labels: str) -> None:
        family.labels(*self._series(family, model_id, labels)).inc()

    def _observe(self, family: Histogram, model_id: str, seconds: float) -> None:
        family.labels(*self._series(family, model_id)).observe(seconds)

    def _level(self, family: Gauge, model_id: str, change: int) -> None:
        self._busy[name_in(model_id)] += change
        family.labels(*self._series(family, model_id)).inc(change)

    def _series(
        self, family: Counter | Gauge | Histogram, model_id: str, labels: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """Return the labels of a series. All versions of a model share the label of its name."""
        name = name_in(model_id)
        self._known.setdefault(name, set()).add((family, (name, *labels)))
        return (name, *labels)

    def _drop(self, name: str) -> None:
        for family, labels in self._known.pop(name):
            family.remove(*labels)
        del self._busy[name]
