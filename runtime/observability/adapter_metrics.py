"""Exports the loaded LoRA adapters under vLLM's names, which routers of llm-d and of the Gateway API read to find a pod that has an adapter."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.model_state import ModelFigures, Tier

# vLLM has two levels; `disk` is an addition.
_LEVELS = {Tier.DEVICE: "gpu", Tier.HOST: "cpu", Tier.DISK: "disk", Tier.REMOTE: "disk"}

_PINNED = "false"  # any idle adapter may leave the device


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """One adapter by the names that clients use. `load_s`: seconds that its last load took."""

    name: str
    base: str
    rank: int
    load_s: float
    figures: ModelFigures


class AdapterMetrics(Collector):
    """The series of the last report. `max_adapters`: of one base on the device at once."""

    def __init__(self, registry: CollectorRegistry, max_adapters: int) -> None:
        self._max_adapters = max_adapters
        self._adapters: Sequence[LoadedAdapter] = ()
        self._reported_s = 0.0
        registry.register(self)

    def update(self, adapters: Sequence[LoadedAdapter]) -> None:
        self._adapters = sorted(adapters, key=lambda adapter: adapter.name)
        self._reported_s = time.time()

    def collect(self) -> Iterable[Metric]:
        """Yield nothing while no adapter is loaded, as a vLLM without LoRA does."""
        if self._adapters:
            yield self._requests()
            yield self._loaded()
            yield from self._of_bases()
            yield self._seconds()

    def _requests(self) -> Metric:
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Time of the report in seconds since 1970. The labels name the adapters of running and waiting sequences.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        running = ",".join(adapter.name for adapter in self._adapters if adapter.figures.running)
        waiting = ",".join(adapter.name for adapter in self._adapters if adapter.figures.waiting)
        info.add_metric((str(self._max_adapters), running, waiting), self._reported_s)
        return info

    def _loaded(self) -> Metric:
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each loaded adapter: in device memory (level gpu), in host memory (cpu) or on disk (disk).",
            labels=("model_name", "adapter_name", "level", "pinned", "rank"),
        )
        for adapter in self._adapters:
            level = _LEVELS[adapter.figures.tier]
            loaded.add_metric((adapter.base, adapter.name, level, _PINNED, str(adapter.rank)), 1)
        return loaded

    def _of_bases(self) -> Iterable[Metric]:
        most = GaugeMetricFamily(
            "vllm:max_gpu_lora_adapters", "Largest number of adapters in device memory at once.", labels=("model_name",)
        )
        now = GaugeMetricFamily(
            "vllm:num_gpu_loaded_lora_adapters", "Number of adapters in device memory.", labels=("model_name",)
        )
        for base in sorted({adapter.base for adapter in self._adapters}):
            most.add_metric((base,), self._max_adapters)
            on_device = [a for a in self._adapters if a.base == base and a.figures.tier is Tier.DEVICE]
            now.add_metric((base,), len(on_device))
        return most, now

    def _seconds(self) -> Metric:
        seconds = GaugeMetricFamily(
            "vllm:lora_adapter_load_seconds",
            "Time that the last load of an adapter took in seconds.",
            labels=("model_name", "adapter_name"),
        )
        for adapter in self._adapters:
            seconds.add_metric((adapter.base, adapter.name), adapter.load_s)
        return seconds
