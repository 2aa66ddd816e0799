"""Prometheus metrics of one pod: requests, queues, loads and evictions, under our names and under those of ModelMesh's dashboards.

The series of a model are dropped once it is no longer registered.
"""

from collections.abc import Callable

from prometheus_client import generate_latest

from mesh.observability.metric_series import Families, LabelledCounter, LabelledGauge, LabelledHistogram
from mesh.observability.modelmesh_metrics import ModelMeshMetrics, PodFigures
from mesh.registry.registration import name_in

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GATHERED = 64  # ended requests
_MISS_MS = 10.0  # ModelMesh counts a request as a cache miss if it waited longer


class Metrics:
    def __init__(self) -> None:
        label = ("model_name",)  # the same label as in the runtime's metrics; all versions of a model share it
        self._requests = LabelledCounter(
            "repertory_mesh_requests",
            "Requests by model, protocol (grpc or http) and final status code",
            ("model_name", "carrier", "code"),
        )
        self._key_requests = LabelledCounter(
            "repertory_mesh_key_requests",
            "Requests by the name of the caller's API key, protocol (grpc or http) and final status code",
            ("key", "carrier", "code"),
        )
        self._first_byte = LabelledHistogram(
            "repertory_mesh_time_to_first_byte_seconds",
            "Seconds from the arrival of a request to the first byte or message of its response, including loading",
            _SECONDS,
            label,
        )
        self._held = LabelledGauge(
            "repertory_mesh_held_requests", "Requests waiting for their model to be loaded", label
        )
        self._in_flight = LabelledGauge(
            "repertory_mesh_in_flight_requests", "Requests forwarded to a copy and not finished", label
        )
        self._loads = LabelledCounter(
            "repertory_mesh_loads", "Model loads by outcome (loaded or failed)", ("model_name", "outcome")
        )
        self._load_seconds = LabelledHistogram(
            "repertory_mesh_load_seconds", "Duration of successful model loads in seconds", _SECONDS, label
        )
        self._evictions = LabelledCounter(
            "repertory_mesh_evictions", "Models unloaded to free memory for another model", label
        )
        self._carried = LabelledCounter(
            "repertory_mesh_carried_requests",
            "Requests that Envoy or a worker carried to a copy, by model and protocol (grpc or http)",
            ("model_name", "carrier"),
        )
        self._carried_seconds = LabelledGauge(
            "repertory_mesh_carried_request_seconds",
            "Median duration in seconds of the requests that Envoy or workers carried to a copy, of about the last second with any",
            ("model_name", "carrier"),
        )
        self._by_model = (
            self._requests,
            self._first_byte,
            self._held,
            self._in_flight,
            self._loads,
            self._load_seconds,
            self._evictions,
            self._carried,
            self._carried_seconds,
        )
        self._modelmesh = ModelMeshMetrics()
        # What each request adds is gathered and counted in a row: between two requests, the code that counts has left the processor's caches.
        self._ended: list[tuple[str, str, str, str, float, str, int, int]] = []
        self._invoked: list[tuple[str, str, float]] = []
        self._answered: list[tuple[str, float]] = []

    def request(
        self,
        model_id: str,
        carrier: str,
        code: str,
        method: str,
        seconds: float,
        *,
        key: str = "",
        request_bytes: int = 0,
        response_bytes: int = 0,
    ) -> None:
        """Count a finished request. `carrier` is grpc or http; `model_id` and `key` are empty if the request has none."""
        self._ended.append((model_id, carrier, code, method, seconds, key, request_bytes, response_bytes))
        if len(self._ended) >= _GATHERED:
            self._count_gathered()

    def carried(self, model_id: str, carrier: str, count: int) -> None:
        """Count requests that Envoy or a worker carried."""
        self._carried.inc(name_in(model_id), carrier, by=count)

    def carried_by_key(self, key: str, carrier: str, code: str, count: int) -> None:
        """Count finished requests that Envoy or a worker carried by the name of the caller's key."""
        self._key_requests.inc(key, carrier, code, by=count)

    def carried_latency(self, model_id: str, carrier: str, seconds: float) -> None:
        """Set the recent median duration of the requests that Envoy or workers carried."""
        self._carried_seconds.set(seconds, name_in(model_id), carrier)

    def invoked(self, method: str, code: str, seconds: float) -> None:
        """Count one call of the local runtime, of which a request may need several."""
        self._invoked.append((method, code, seconds))

    def waited_for_load(self, seconds: float) -> None:
        """Count a request that has waited for its model to be loaded."""
        if seconds * 1000 > _MISS_MS:
            self._modelmesh.cache_miss.observe(seconds * 1000)

    def waited_for_slot(self, seconds: float) -> None:
        """Count a request that has waited for one of its copy's concurrent requests."""
        self._modelmesh.request_queue_delay.observe(seconds * 1000)

    def first_byte(self, model_id: str, seconds: float) -> None:
        self._answered.append((model_id, seconds))

    def held(self, model_id: str, change: int) -> None:
        self._held.change(change, name_in(model_id))

    def in_flight(self, model_id: str, change: int) -> None:
        self._in_flight.change(change, name_in(model_id))

    def load_started(self, waited_s: float) -> None:
        """Count a load that has waited for other loads and begins now."""
        self._modelmesh.load_queue_delay.observe(waited_s * 1000)

    def loaded(self, model_id: str, seconds: float, size_bytes: int, sizing_s: float) -> None:
        """Count a load. `sizing_s`: how long the runtime took to answer the size; 0 if the load's answer contained it."""
        self._loads.inc(name_in(model_id), "loaded")
        self._load_seconds.observe(seconds, name_in(model_id))
        self._modelmesh.load.observe(seconds * 1000)
        self._modelmesh.loaded_model_size.observe(size_bytes)
        if sizing_s:
            self._modelmesh.model_sizing.observe(sizing_s * 1000)

    def load_failed(self, model_id: str) -> None:
        self._loads.inc(name_in(model_id), "failed")
        self._modelmesh.load_failure.inc()

    def evicted(self, model_id: str, age_ms: int) -> None:
        """Count an eviction. `age_ms`: the time since the model was last used."""
        self._evictions.inc(name_in(model_id))
        self._modelmesh.age_at_eviction.observe(age_ms)

    def unloaded(self, seconds: float) -> None:
        self._modelmesh.unload.observe(seconds * 1000)

    def unload_attempt_failed(self) -> None:
        self._modelmesh.unload_attempt_failure.inc()

    def unload_failed(self) -> None:
        self._modelmesh.unload_failure.inc()

    def text(self, figures: PodFigures, is_registered: Callable[[str], bool]) -> bytes:
        """Return all series in Prometheus' text format, after dropping those of models that are no longer registered."""
        self._count_gathered()
        for name in {name for family in self._by_model for name in family.first_labels()}:
            if name and not self._is_busy(name) and not is_registered(name):
                for family in self._by_model:
                    family.drop(name)
        families = Families(family.family() for family in (*self._by_model, self._key_requests))
        return generate_latest(families) + self._modelmesh.text(figures)

    def _count_gathered(self) -> None:
        for model_id, carrier, code, method, seconds, key, request_bytes, response_bytes in self._ended:
            self._requests.inc(name_in(model_id), carrier, code)
            if key:
                self._key_requests.inc(key, carrier, code)
            self._modelmesh.api_request.observe(seconds * 1000, method, code)
            self._modelmesh.request_size.observe(request_bytes, method, code)
            self._modelmesh.response_size.observe(response_bytes, method, code)
        for method, code, seconds in self._invoked:
            self._modelmesh.invoke_model.observe(seconds * 1000, method, code)
        for model_id, seconds in self._answered:
            self._first_byte.observe(seconds, name_in(model_id))
        for gathered in (self._ended, self._invoked, self._answered):
            gathered.clear()

    def _is_busy(self, name: str) -> bool:
        """Whether a gauge of the model is above 0. It will be decremented, so it must not be dropped."""
        return bool(self._held.value(name) or self._in_flight.value(name))
