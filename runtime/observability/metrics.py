"""The runtime's Prometheus metrics: its own names, and vLLM's family of names, which dashboards and autoscalers already know.

One label, the model's name; a model's series go when it does. Knows nothing of HTTP.
"""

import time
from collections.abc import Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from common.model_state import ModelFigures, Tier
from runtime.ipc.messages import EngineStats, RowTokens
from runtime.observability.token_counters import ModelTokenCounters
from runtime.types import FinishReason

_M = TypeVar("_M", bound=MetricWrapperBase)
_LABEL = ("model_name",)
_TTFT_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
_INTER_TOKEN_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
    40.0,
)
_REQUEST_S = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_FINISHED = {  # vLLM's words
    FinishReason.EOS: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.TIME_LIMIT: "abort",
    FinishReason.ABORTED: "abort",
}
_TIERS = {Tier.DISK: 1, Tier.HOST: 2, Tier.DEVICE: 3}


class Instruments:
    """Every metric, made in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.by_model: list[MetricWrapperBase] = []
        self.tallies = ModelTokenCounters(_LABEL[0], _INTER_TOKEN_S)
        registry.register(self.tallies)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that were started.")
        self.success = self._counter("vllm:request_success", "Sequences that ended, by reason.", "finished_reason")
        self.preemptions = self._counter("vllm:num_preemptions", "Sequences whose KV was taken away while they ran.")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT_S)
        self.per_output_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between a request's tokens.", _INTER_TOKEN_S
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_S)
        self.queue = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the engine's first step.", _REQUEST_S
        )
        self.request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generation = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request.", _TOKENS
        )
        self.running = self._gauge("vllm:num_requests_running", "Sequences in the engine's batches.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Sequences waiting for the engine.")
        self.kv_usage = self._gauge(
            "vllm:kv_cache_usage_perc",
            "KV of running sequences over the KV that the model could have without a preemption (1 = all).",
        )
        self.tier = self._gauge("repertory_model_tier", "Where the weights are: 3 device, 2 host, 1 disk.")
        self.weight_bytes = self._gauge("repertory_model_weight_bytes", "Size of the weights.")
        self.device_bytes = self._gauge(
            "repertory_model_device_bytes", "Weights and KV in device memory, in whole slabs."
        )
        self.kv_bytes = self._gauge("repertory_model_kv_bytes", "KV in device memory, in whole slabs.")
        self.swap_ins = self._counter("repertory_model_swap_ins", "Times the weights came back to the device.")
        self.evictions = self._counter("repertory_model_evictions", "Times the weights left the device.")
        self.step_seconds = self._counter("repertory_model_step_seconds", "Time in forward passes.")
        self.device_used = Gauge(
            "repertory_device_used_bytes", "Device memory lent to weights and KV.", registry=registry
        )
        self.device_budget = Gauge(
            "repertory_device_budget_bytes", "Device memory for weights and KV.", registry=registry
        )
        self.host_used = Gauge("repertory_host_used_bytes", "Host arena in use.", registry=registry)
        self.host_budget = Gauge("repertory_host_budget_bytes", "Size of the host arena.", registry=registry)
        self.stranded = Gauge("repertory_stranded_bytes", "Free blocks inside of half-empty slabs.", registry=registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._kept(Counter(name, text, (*_LABEL, *labels), registry=self.registry))

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._kept(Gauge(name, text, _LABEL, registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._kept(Histogram(name, text, _LABEL, registry=self.registry, buckets=buckets))

    def _kept(self, metric: _M) -> _M:
        self.by_model.append(metric)
        return metric


class Observer:
    """One sequence's way through the engine."""

    __slots__ = ("_first_s", "_last_s", "_model", "_num_prompt", "_num_tokens", "_start_s")

    def __init__(self, model: "ModelMetrics", num_prompt: int, now_s: float) -> None:
        self._model = model
        self._num_prompt = num_prompt
        self._num_tokens = 0
        self._start_s = self._first_s = self._last_s = now_s
        model.prompt_tokens.inc(num_prompt)

    def tokens(self, count: int, now_s: float, row: RowTokens) -> None:
        if not count:
            return
        model = self._model
        if self._num_tokens == 0:
            self._first_s = now_s
            model.ttft.observe(now_s - self._start_s)
            if row.queue_s is not None:
                model.queue.observe(row.queue_s)
        else:
            model.tally.gap((now_s - self._last_s) / count)
        self._last_s = now_s
        self._num_tokens += count
        model.tally.tokens += count

    def end(self, finish: FinishReason | None) -> None:
        """`finish` None: the caller left, or the engine failed."""
        model = self._model
        model.ended(_FINISHED.get(finish, "abort") if finish else "abort")
        if finish is None:
            return
        model.e2e.observe(time.monotonic() - self._start_s)
        model.request_prompt.observe(self._num_prompt)
        model.request_generation.observe(self._num_tokens)
        if self._num_tokens > 1:
            model.per_output_token.observe((self._last_s - self._first_s) / (self._num_tokens - 1))


class ModelMetrics:
    """The series of one model, looked up once."""

    def __init__(self, name: str, instruments: Instruments) -> None:
        self.name = name
        self._instruments = instruments
        self._seen: ModelFigures | None = None
        self.prompt_tokens = instruments.prompt_tokens.labels(name)
        self.ttft = instruments.ttft.labels(name)
        self.tally = instruments.tallies.of(name)
        self.per_output_token = instruments.per_output_token.labels(name)
        self.e2e = instruments.e2e.labels(name)
        self.queue = instruments.queue.labels(name)
        self.request_prompt = instruments.request_prompt.labels(name)
        self.request_generation = instruments.request_generation.labels(name)

    def start(self, num_prompt: int) -> Observer:
        return Observer(self, num_prompt, time.monotonic())

    def ended(self, reason: str) -> None:
        self._instruments.success.labels(self.name, reason).inc()

    def update(self, stats: ModelFigures) -> None:
        """Counters take what was added since the last time; an engine that restarted begins at 0."""
        to, name = self._instruments, self.name
        to.running.labels(name).set(stats.running)
        to.waiting.labels(name).set(stats.waiting)
        to.kv_usage.labels(name).set(stats.kv_usage)
        to.tier.labels(name).set(_TIERS[stats.tier])
        to.weight_bytes.labels(name).set(stats.weight_bytes)
        to.device_bytes.labels(name).set(stats.device_bytes)
        to.kv_bytes.labels(name).set(stats.kv_bytes)
        before = self._seen
        if before is None or stats.steps_total < before.steps_total:
            before = ModelFigures()
        for counter, field in (
            (to.preemptions, "preemptions_total"),
            (to.prefix_queries, "prompt_tokens_total"),
            (to.prefix_hits, "prefix_hit_tokens_total"),
            (to.swap_ins, "swap_ins_total"),
            (to.evictions, "evictions_total"),
            (to.step_seconds, "step_seconds_total"),
        ):
            counter.labels(name).inc(max(0.0, getattr(stats, field) - getattr(before, field)))
        self._seen = stats


class RuntimeMetrics:
    """What the runtime counts. One a process, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._instruments = Instruments(registry or CollectorRegistry())
        self._models: dict[str, ModelMetrics] = {}

    def of(self, name: str) -> ModelMetrics:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = ModelMetrics(name, self._instruments)
        return model

    def update(self, stats: EngineStats, names: Mapping[str, str]) -> None:
        """Takes over the engine's report. `names`: model id → the name that answers carry; other models' series go."""
        to = self._instruments
        to.device_used.set(stats.device_used_bytes)
        to.device_budget.set(stats.device_budget_bytes)
        to.host_used.set(stats.host_used_bytes)
        to.host_budget.set(stats.host_budget_bytes)
        to.stranded.set(stats.stranded_bytes)
        for model in stats.models:
            if model.model_id in names:
                self.of(names[model.model_id]).update(model)
        for name in set(self._models) - set(names.values()):
            self.forget(name)

    def forget(self, name: str) -> None:
        """Drops a model's series."""
        if self._models.pop(name, None) is None:
            return
        for metric in self._instruments.by_model:
            metric.remove_by_labels({"model_name": name})
        self._instruments.tallies.forget(name)

    def render(self) -> bytes:
        """Prometheus' text format, version 0.0.4."""
        return generate_latest(self._instruments.registry)
