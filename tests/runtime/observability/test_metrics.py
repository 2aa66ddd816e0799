"""Metrics: vLLM's names with values that add up, counters over an engine's restart, series that go with their model."""

from common.model_state import ModelFigures, Tier
from runtime.engine_client.engine_group import EngineGroup
from runtime.engine_client.lifecycle import EngineState
from runtime.ipc.messages import EngineStats, GrammarFigures, Hello, RowTokens
from runtime.observability.metrics import RuntimeMetrics
from runtime.types import FinishReason

HELLO = Hello(1, "cuda:0", "a GPU", 1000, 2000, 10, 256)


def group(stats: EngineStats, *devices: str) -> EngineGroup:
    return EngineGroup(devices, HELLO, stats, EngineState.READY, frozenset())


def stats(*models: ModelFigures, grammars: GrammarFigures | None = None) -> list[EngineGroup]:
    return [group(EngineStats(1000, 400, 2000, 500, 7, models, grammars or GrammarFigures()), "cuda:0")]


def model_stats(model_id: str = "id1", **fields: float) -> ModelFigures:
    values = {
        "weight_bytes": 100, "device_bytes": 300, "kv_bytes": 200, "kv_used_tokens": 30, "kv_cached_tokens": 10, "running": 3, "waiting": 4,
        "kv_usage": 0.25, **fields,
    }  # fmt: skip
    return ModelFigures(model_id=model_id, tier=Tier.DEVICE, **values)  # type: ignore[arg-type]


def test_gauges_come_from_the_engines_report() -> None:
    metrics = RuntimeMetrics()
    metrics.update(stats(model_stats(), model_stats("unknown")), {"id1": "shown"})
    text = metrics.render().decode()
    assert 'vllm:num_requests_running{model_name="shown"} 3.0' in text
    assert 'vllm:num_requests_waiting{model_name="shown"} 4.0' in text
    assert 'vllm:kv_cache_usage_perc{model_name="shown"} 0.25' in text
    assert 'repertory_model_tier{model_name="shown"} 3.0' in text
    assert 'repertory_device_used_bytes{device="cuda:0"} 400.0' in text
    assert "unknown" not in text


def test_saved_kv_is_counted_in_blocks_and_bytes() -> None:
    metrics = RuntimeMetrics()
    for saved, restored, dropped in ((5, 1, 0), (9, 4, 2)):
        figures = model_stats(
            kv_host_bytes=700,
            kv_saved_blocks_total=saved,
            kv_restored_blocks_total=restored,
            kv_dropped_blocks_total=dropped,
        )
        metrics.update(stats(figures), {"id1": "m"})
    text = metrics.render().decode()
    assert 'repertory_model_kv_host_bytes{model_name="m"} 700.0' in text
    for name, count in (("saved", 9), ("restored", 4), ("dropped", 2)):
        assert f'repertory_model_kv_{name}_blocks_total{{model_name="m"}} {count}.0' in text


def test_figures_of_several_groups_add_up() -> None:
    metrics = RuntimeMetrics()
    for _ in range(2):
        pair = EngineStats(1000, 400, 0, 0, 0, (model_stats("a"),), GrammarFigures(grammars_total=2))
        one = EngineStats(900, 100, 0, 0, 0, (model_stats("b"),), GrammarFigures(grammars_total=3))
        metrics.update([group(pair, "cuda:0", "cuda:1"), group(one, "cuda:2")], {"a": "a", "b": "b"})
    text = metrics.render().decode()
    used = {
        f'repertory_device_used_bytes{{device="cuda:{number}"}} {size}.0' for number, size in enumerate((400, 400, 100))
    }
    assert used <= set(text.splitlines())
    assert "repertory_grammars_total 5.0" in text
    assert 'vllm:num_requests_running{model_name="b"} 3.0' in text


def test_counters_add_up_over_a_restart_of_the_engine() -> None:
    metrics = RuntimeMetrics()
    for steps, preemptions in ((10, 2.0), (20, 5.0), (3, 1.0), (4, 1.0)):
        metrics.update(stats(model_stats(steps_total=steps, preemptions_total=preemptions)), {"id1": "m"})
    assert 'vllm:num_preemptions_total{model_name="m"} 6.0' in metrics.render().decode()


def test_metrics_observe_a_sequence_from_start_to_end() -> None:
    metrics = RuntimeMetrics()
    observer = metrics.of("m").start(7)
    row = RowTokens(1, (5,), queue_s=0.25)
    now_s = 1e9
    observer.tokens(1, now_s, row)
    observer.tokens(2, now_s + 0.2, RowTokens(1, (5, 6)))
    observer.end(FinishReason.EOS)
    metrics.of("m").start(1).end(None)
    text = metrics.render().decode()
    assert 'vllm:prompt_tokens_total{model_name="m"} 8.0' in text
    assert 'vllm:generation_tokens_total{model_name="m"} 3.0' in text
    assert 'vllm:request_queue_time_seconds_sum{model_name="m"} 0.25' in text
    assert 'vllm:inter_token_latency_seconds_count{model_name="m"} 1.0' in text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="m"} 1.0' in text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="m"} 1.0' in text


def test_metrics_add_up_the_cost_of_grammars_over_a_restart() -> None:
    metrics = RuntimeMetrics()
    for masks, grammars in ((10, 1), (30, 2), (5, 1)):
        figures = GrammarFigures(grammars_total=grammars, masks_total=masks, mask_seconds_total=masks / 8)
        metrics.update(stats(grammars=figures), {})
    text = metrics.render().decode()
    assert "repertory_grammar_masks_total 35.0" in text
    assert "repertory_grammar_mask_seconds_total 4.375" in text
    assert "repertory_grammars_total 3.0" in text


def test_guided_sequences_calls_and_reasoning_are_counted() -> None:
    metrics = RuntimeMetrics()
    metrics.of("m").start(1, guided=True).agent(2, 7)
    metrics.of("m").start(1).agent(1, 0)
    text = metrics.render().decode()
    assert 'repertory_guided_requests_total{model_name="m"} 1.0' in text
    assert 'repertory_tool_calls_total{model_name="m"} 3.0' in text
    assert 'repertory_reasoning_tokens_total{model_name="m"} 7.0' in text


def test_metrics_drop_the_series_of_an_unloaded_model() -> None:
    metrics = RuntimeMetrics()
    metrics.of("a").start(1).end(FinishReason.EOS)
    metrics.update(stats(model_stats()), {"id1": "b"})
    text = metrics.render().decode()
    assert 'model_name="a"' not in text
    assert 'model_name="b"' in text
