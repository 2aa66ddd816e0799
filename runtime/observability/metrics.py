"""Prometheus metrics of the runtime, under vLLM's names where one exists, so that dashboards and autoscalers work unchanged.

Series are labelled with the model's name and dropped when the model is unloaded.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from common.model_state import ModelFigures, Tier
from runtime.engine_client.engine_group import EngineGroup, device_figures
from runtime.ipc.messages import EngineStats, GrammarFigures, RowTokens
from runtime.observability.adapter_metrics import AdapterMetrics
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
_FINISHED = {  # vLLM's values of the label finished_reason
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
    """All metrics, registered in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.by_model: list[MetricWrapperBase] = []
        self.token_counters = ModelTokenCounters(_LABEL[0], _INTER_TOKEN_S)
        registry.register(self.token_counters)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Number of prompt tokens of started requests.")
        self.success = self._counter(
            "vllm:request_success", "Number of finished sequences by reason.", "finished_reason"
        )
        self.preemptions = self._counter("vllm:num_preemptions", "Number of preemptions of running sequences.")
        self.prefix_queries = self._counter(
            "vllm:prefix_cache_queries", "Number of prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Number of prompt tokens found in the prefix cache.")
        self.ttft = self._histogram(
            "vllm:time_to_first_token_seconds", "Time from arrival to the first token in seconds.", _TTFT_S
        )
        self.per_output_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time per output token of a request in seconds.",
            _INTER_TOKEN_S,
        )
        self.e2e = self._histogram(
            "vllm:e2e_request_latency_seconds", "Time from arrival to the last token in seconds.", _REQUEST_S
        )
        self.queue = self._histogram(
            "vllm:request_queue_time_seconds", "Time from arrival to the first step in seconds.", _REQUEST_S
        )
        self.request_prompt = self._histogram(
            "vllm:request_prompt_tokens", "Number of prompt tokens per request.", _TOKENS
        )
        self.request_generation = self._histogram(
            "vllm:request_generation_tokens", "Number of generated tokens per request.", _TOKENS
        )
        self.running = self._gauge("vllm:num_requests_running", "Number of running sequences.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Number of waiting sequences.")
        self.kv_usage = self._gauge(
            "vllm:kv_cache_usage_perc",
            "KV cache used by running sequences as a share of what the model could use without preemption (1 = all).",
        )
        self.tier = self._gauge("repertory_model_tier", "Memory tier of the weights: 3 = device, 2 = host, 1 = disk.")
        self.weight_bytes = self._gauge("repertory_model_weight_bytes", "Size of the weights in bytes.")
        self.device_bytes = self._gauge(
            "repertory_model_device_bytes", "Device memory of weights and KV cache in bytes, in whole slabs."
        )
        self.kv_bytes = self._gauge(
            "repertory_model_kv_bytes", "Device memory of the KV cache in bytes, in whole slabs."
        )
        self.swap_ins = self._counter("repertory_model_swap_ins", "Number of swap-ins of the weights.")
        self.evictions = self._counter("repertory_model_evictions", "Number of evictions of the weights.")
        self.kv_host_bytes = self._gauge(
            "repertory_model_kv_host_bytes", "Host memory of saved KV cache in bytes, in whole slabs."
        )
        self.kv_saved = self._counter(
            "repertory_model_kv_saved_blocks", "Number of KV blocks copied to host memory before they left the device."
        )
        self.kv_restored = self._counter(
            "repertory_model_kv_restored_blocks", "Number of KV blocks copied from host memory for a request."
        )
        self.kv_dropped = self._counter(
            "repertory_model_kv_dropped_blocks", "Number of KV blocks dropped from host memory."
        )
        self.step_seconds = self._counter(
            "repertory_model_step_seconds", "Device time of the model's steps in seconds."
        )
        self.guided = self._counter(
            "repertory_guided_requests", "Number of sequences whose output a grammar constrains."
        )
        self.tool_calls = self._counter("repertory_tool_calls", "Number of tool calls that were read from outputs.")
        self.reasoning_tokens = self._counter("repertory_reasoning_tokens", "Number of generated reasoning tokens.")
        self.grammars = [
            (Counter(f"repertory_{name}", text, registry=registry), f"{field}_total")
            for name, field, text in (
                ("grammar_tokenizers", "tokenizers", "Number of tokenizers built for grammars."),
                ("grammar_tokenizer_seconds", "tokenizer_seconds", "Time to build tokenizers for grammars in seconds."),
                ("grammars", "grammars", "Number of grammars built."),
                ("grammar_seconds", "grammar_seconds", "Time to build grammars in seconds."),
                ("known_grammars", "known_grammars", "Number of requests whose grammar had been built before."),
                ("grammar_masks", "masks", "Number of token masks computed."),
                ("grammar_mask_seconds", "mask_seconds", "Time to compute token masks in seconds."),
            )
        ]
        self.device_used = self._of_device(
            "repertory_device_used_bytes", "Device memory lent to weights and KV cache in bytes."
        )
        self.device_budget = self._of_device(
            "repertory_device_budget_bytes", "Device memory budget for weights and KV cache in bytes."
        )
        self.host_used = self._of_device("repertory_host_used_bytes", "Used part of the device's host arena in bytes.")
        self.host_budget = self._of_device("repertory_host_budget_bytes", "Size of the device's host arena in bytes.")
        self.stranded = self._of_device("repertory_stranded_bytes", "Free KV blocks in partly used slabs, in bytes.")

    def _of_device(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("device",), registry=self.registry)

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
    """Records the latencies and token counts of one sequence."""

    __slots__ = ("_first_s", "_last_s", "_model", "_num_prompt", "_num_tokens", "_start_s")

    def __init__(self, model: "ModelMetrics", num_prompt: int, now_s: float, *, guided: bool) -> None:
        self._model = model
        self._num_prompt = num_prompt
        self._num_tokens = 0
        self._start_s = self._first_s = self._last_s = now_s
        model.prompt_tokens.inc(num_prompt)
        if guided:
            model.guided.inc()

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
            model.token_counters.gap((now_s - self._last_s) / count)
        self._last_s = now_s
        self._num_tokens += count
        model.token_counters.tokens += count

    def agent(self, num_calls: int, num_reasoning: int) -> None:
        """Record the sequence's tool calls and reasoning tokens."""
        if num_calls:
            self._model.tool_calls.inc(num_calls)
        if num_reasoning:
            self._model.reasoning_tokens.inc(num_reasoning)

    def end(self, finish: FinishReason | None) -> None:
        """Record the end. `finish` is None if the client disconnected or the engine failed."""
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
    """The series of one model, so that labels are resolved once."""

    def __init__(self, name: str, instruments: Instruments) -> None:
        self.name = name
        self._instruments = instruments
        self._seen: ModelFigures | None = None
        self.prompt_tokens = instruments.prompt_tokens.labels(name)
        self.ttft = instruments.ttft.labels(name)
        self.token_counters = instruments.token_counters.of(name)
        self.per_output_token = instruments.per_output_token.labels(name)
        self.e2e = instruments.e2e.labels(name)
        self.queue = instruments.queue.labels(name)
        self.request_prompt = instruments.request_prompt.labels(name)
        self.request_generation = instruments.request_generation.labels(name)
        self.guided = instruments.guided.labels(name)
        self.tool_calls = instruments.tool_calls.labels(name)
        self.reasoning_tokens = instruments.reasoning_tokens.labels(name)

    def start(self, num_prompt: int, *, guided: bool = False) -> Observer:
        return Observer(self, num_prompt, time.monotonic(), guided=guided)

    def ended(self, reason: str) -> None:
        self._instruments.success.labels(self.name, reason).inc()

    def update(self, stats: ModelFigures) -> None:
        """Set the gauges, and increase the counters by what was added since the last update. A restarted engine counts from 0."""
        to, name = self._instruments, self.name
        to.running.labels(name).set(stats.running)
        to.waiting.labels(name).set(stats.waiting)
        to.kv_usage.labels(name).set(stats.kv_usage)
        to.tier.labels(name).set(_TIERS[stats.tier])
        to.weight_bytes.labels(name).set(stats.weight_bytes)
        to.device_bytes.labels(name).set(stats.device_bytes)
        to.kv_bytes.labels(name).set(stats.kv_bytes)
        to.kv_host_bytes.labels(name).set(stats.kv_host_bytes)
        before = self._seen
        if before is None or stats.steps_total < before.steps_total:
            before = ModelFigures()
        for counter, field in (
            (to.preemptions, "preemptions_total"),
            (to.prefix_queries, "prompt_tokens_total"),
            (to.prefix_hits, "prefix_hit_tokens_total"),
            (to.swap_ins, "swap_ins_total"),
            (to.evictions, "evictions_total"),
            (to.kv_saved, "kv_saved_blocks_total"),
            (to.kv_restored, "kv_restored_blocks_total"),
            (to.kv_dropped, "kv_dropped_blocks_total"),
            (to.step_seconds, "step_seconds_total"),
        ):
            counter.labels(name).inc(max(0.0, getattr(stats, field) - getattr(before, field)))
        self._seen = stats


class RuntimeMetrics:
    """The metrics of one runtime process, by default in a registry of their own."""

    def __init__(self, registry: CollectorRegistry | None = None, *, max_adapters: int = 1) -> None:
        self._instruments = Instruments(registry or CollectorRegistry())
        self.adapters = AdapterMetrics(self._instruments.registry, max_adapters)
        self._models: dict[str, ModelMetrics] = {}
        self._grammars: dict[tuple[str, ...], GrammarFigures] = {}  # those of the last report, by the group's devices

    def of(self, name: str) -> ModelMetrics:
        model = self._models.get(name)
        if model is None:
            model = self._models[name] = ModelMetrics(name, self._instruments)
        return model

    def update(self, groups: Sequence[EngineGroup], names: Mapping[str, str]) -> None:
        """Record the engines' reports. `names` maps a model's id to its name; the series of other models are dropped."""
        to = self._instruments
        for device in device_figures(groups):
            to.device_used.labels(device.name).set(device.used_bytes)
            to.device_budget.labels(device.name).set(device.budget_bytes)
            to.host_used.labels(device.name).set(device.host_used_bytes)
            to.host_budget.labels(device.name).set(device.host_budget_bytes)
            to.stranded.labels(device.name).set(device.stranded_bytes)
        for group in groups:
            if group.stats is not None:
                self._update_group(group, group.stats, names)
        for name in set(self._models) - set(names.values()):
            self.forget(name)

    def _update_group(self, group: EngineGroup, stats: EngineStats, names: Mapping[str, str]) -> None:
        to = self._instruments
        before = self._grammars.get(group.devices, GrammarFigures())
        if stats.grammars.masks_total < before.masks_total:
            before = GrammarFigures()
        for counter, field in to.grammars:
            counter.inc(max(0.0, getattr(stats.grammars, field) - getattr(before, field)))
        self._grammars[group.devices] = stats.grammars
        for model in stats.models:
            if model.model_id in names:
                self.of(names[model.model_id]).update(model)

    def forget(self, name: str) -> None:
        """Drop the series of a model."""
        if self._models.pop(name, None) is None:
            return
        for metric in self._instruments.by_model:
            metric.remove_by_labels({"model_name": name})
        self._instruments.token_counters.forget(name)

    def render(self) -> bytes:
        """Return all series in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._instruments.registry)
