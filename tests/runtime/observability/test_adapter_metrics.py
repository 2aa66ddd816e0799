"""Metrics of LoRA adapters, by vLLM's names and labels."""

import time

from common.model_state import ModelFigures, Tier
from runtime.observability.adapter_metrics import LoadedAdapter
from runtime.observability.metrics import RuntimeMetrics


def adapter(
    name: str, tier: Tier = Tier.DEVICE, *, base: str = "llama", running: int = 0, waiting: int = 0
) -> LoadedAdapter:
    figures = ModelFigures(model_id=f"{name}__1", tier=tier, running=running, waiting=waiting)
    return LoadedAdapter(name, base, 8, load_s=0.5, figures=figures)


def rendered(metrics: RuntimeMetrics) -> list[str]:
    return [line for line in metrics.render().decode().splitlines() if line.startswith("vllm:") and "lora" in line]


def test_metrics_without_adapters_have_no_series_of_adapters() -> None:
    metrics = RuntimeMetrics(max_adapters=4)
    assert rendered(metrics) == []
    metrics.adapters.update([adapter("sql")])
    assert rendered(metrics)
    metrics.adapters.update([])
    assert rendered(metrics) == []


def test_requests_info_names_adapters_in_flight_and_is_the_time_of_the_report() -> None:
    metrics = RuntimeMetrics(max_adapters=4)
    metrics.adapters.update(
        [adapter("sql", running=2, waiting=1), adapter("legal", running=1), adapter("idle"), adapter("new", waiting=3)]
    )
    [line] = [line for line in rendered(metrics) if line.startswith("vllm:lora_requests_info")]
    labels, value = line.rsplit(" ", 1)
    assert labels == (
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="legal,sql",waiting_lora_adapters="new,sql"}'
    )
    assert abs(float(value) - time.time()) < 60


def test_loaded_adapters_have_their_tier_as_a_level() -> None:
    metrics = RuntimeMetrics(max_adapters=4)
    tiers = {"sql": Tier.DEVICE, "legal": Tier.HOST, "poems": Tier.DISK}
    metrics.adapters.update([*(adapter(name, tier) for name, tier in tiers.items()), adapter("other", base="qwen")])
    lines = rendered(metrics)
    for name, base, level in (
        ("sql", "llama", "gpu"),
        ("legal", "llama", "cpu"),
        ("poems", "llama", "disk"),
        ("other", "qwen", "gpu"),
    ):
        labels = f'adapter_name="{name}",level="{level}",model_name="{base}",pinned="false",rank="8"'
        assert f"vllm:lora_adapter_loaded{{{labels}}} 1.0" in lines
    for base in ("llama", "qwen"):
        assert f'vllm:num_gpu_loaded_lora_adapters{{model_name="{base}"}} 1.0' in lines
        assert f'vllm:max_gpu_lora_adapters{{model_name="{base}"}} 4.0' in lines
    assert 'vllm:lora_adapter_load_seconds{adapter_name="sql",model_name="llama"} 0.5' in lines
