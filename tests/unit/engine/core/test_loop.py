"""The loop on the fake backend, scene by scene: steps, faults, limits, ends."""

import pytest

from runtime.engine.interfaces import KvGeometry
from runtime.ipc.messages import EngineStats, Loaded, Tokens
from runtime.types import FinishReason, LogprobParams, SamplingParams
from tests.support.engine_stage import Stage, error_of, stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec


def test_loop_emits_one_message_per_step() -> None:
    made = stage("a")
    for i in range(5):
        made.add("a", [10 + i], 6)
    made.until_quiet()
    made.check_all()
    sizes = [len(event.rows) for event in made.of(Tokens)]  # type: ignore[union-attr]
    assert sizes == [5] * 6
    assert made.backend.steps == 6
    made.close()


def test_loop_alternates_two_resident_models() -> None:
    made = stage("ab")
    made.add("a", [10], 30)
    made.add("b", [10], 30)
    made.until_quiet()
    order = [event.model_id for event in made.of(Tokens)]  # type: ignore[union-attr]
    assert order[:20] in (["a", "b"] * 10, ["b", "a"] * 10)
    made.close()


def test_loop_chunks_prompt_to_quantum_only_beside_other_models() -> None:
    made = stage(
        "ab",
        max_model_len=1000,
        config={"quantum_us": 250, "max_batch_tokens": 512, "max_rows": 16},
        kv=KvGeometry(16, 8, 8, 1, 64, 64),
    )
    made.backend.max_batch_tokens = 512
    for _ in range(20):  # learn what a step costs: 100 + 2 µs a token
        made.add("a", [10], 3)
        made.add("b", [10], 3)
        made.until_quiet()
    made.backend.largest_step = 0
    made.add("a", list(range(20, 40)) * 20, 3)
    made.until_quiet()
    assert made.backend.largest_step == 400
    made.backend.largest_step = 0
    made.add("b", [11], 60)
    made.add("a", list(range(40, 60)) * 20, 3)
    made.until_quiet()
    assert 64 <= made.backend.largest_step <= 90  # (250 - 100) / 2 = 75
    made.check_all()
    made.close()


def test_loop_scores_prompt_that_fills_all_kv() -> None:
    made = stage("ab", total_slabs=12, weight_slabs=8, max_model_len=4096)
    most = next(event.facts.max_model_len for event in made.events if isinstance(event, Loaded))
    assert most == 4 * 128
    answer = made.add("b", [3] * most, 4, logprobs=LogprobParams(prompt=0))
    made.until_quiet()
    assert answer.finish is FinishReason.CONTEXT
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == most
    made.close()


def test_stats_estimate_when_running_sequences_end() -> None:
    made = stage("a", max_model_len=1000)
    assert made.stats().models[0].busy_s == 0.0
    for _ in range(8):  # learn what a step costs: 100 + 2 µs a token
        made.add("a", [10], 3)
        made.until_quiet()
    made.add("a", [10], 200)
    made.add("a", [10], 50)
    made.turn(3)
    assert made.stats().models[0].busy_s == pytest.approx(200 * 104e-6, rel=0.1)
    made.close()


def test_commands_abort_frees_row_at_once() -> None:
    made = stage("a", latency_polls=50)
    answer = made.add("a", [4], 100)
    made.turn(5)
    assert made.loop.table.rows.free == 15
    made.abort(1, 999)
    made.turn()
    assert answer.finish is FinishReason.ABORTED
    assert made.loop.table.rows.free == 16
    made.turn(5)
    made.close()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_loop_step_fault_fails_rows_and_second_unloads_model(where: str) -> None:
    made = stage("ab", latency_polls=50)
    lost = [made.add("a", [4], 100) for _ in range(3)]
    other = made.add("b", [4], 20)
    made.turn(6)
    made.backend.faults["a"] = where
    made.turn(6)
    assert [error_of(a)[0] for a in lost] == ["INTERNAL"] * 3
    assert "stumbled" in error_of(lost[0])[1] or "refuses" in error_of(lost[0])[1]
    good = made.add("a", [4], 4)
    made.until_quiet()
    assert good.finish is FinishReason.LENGTH
    for _ in range(2):
        made.backend.faults["a"] = where
        made.add("a", [4], 4)
        made.turn(8)
    assert [f.model_id for f in made.failures()] == ["a"]
    assert "a" not in made.loop.table.models
    made.until_quiet()
    assert other.finish is FinishReason.LENGTH
    made.check_all()
    made.close()


def test_loop_raises_when_device_is_lost() -> None:
    made = stage("a")
    made.add("a", [4], 10)
    made.turn(2)

    def lost() -> None:
        raise RuntimeError("the device fell off the bus")

    made.backend.synchronize = lost  # type: ignore[method-assign]
    made.backend.faults["a"] = "launch"
    with pytest.raises(RuntimeError, match="fell off"):
        made.turn(5)


def test_refusals_name_the_limit_and_the_value() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(max_model_len=20)}))
    made.load("a", max_waiting=3)
    made.turn(10)
    too_long = made.add("a", [4] * 21, 4)
    empty = made.add("a", [], 4)
    made.turn()
    for answer, value in ((too_long, "21"), (empty, "0")):
        code, text = error_of(answer)
        assert code == "INVALID_ARGUMENT"
        assert "20" in text
        assert value in text
    answers = [made.add("a", [4], 4) for _ in range(5)]
    made.turn()
    refused = [error_of(a) for a in answers if a.finish is FinishReason.ERROR]
    assert [code for code, _ in refused] == ["RESOURCE_EXHAUSTED"] * 2
    assert "limit is 3" in refused[0][1]
    hints = [answer.last.retry_after_s for answer in answers if answer.last is not None]
    assert all(hint is None or hint > 0 for hint in hints)
    made.until_quiet()
    made.close()


def test_loop_emits_logprobs_and_cached_tokens_once() -> None:
    made = stage("a", eos=(0, 1))
    made.add("a", list(range(20)), 5, logprobs=LogprobParams(generated=0, prompt=0))
    made.add("a", list(range(20)), 0)
    made.until_quiet()
    again = made.add("a", list(range(20)), 5, logprobs=LogprobParams(generated=0))
    made.until_quiet()
    made.check_all()
    assert again.cached_tokens == 16
    assert made.answers[2].finish is FinishReason.LENGTH
    made.close()


def test_loop_passes_sampling_to_runner() -> None:
    made = stage("a")
    sampling = SamplingParams(temperature=0.7, seed=5, top_p=0.9)
    made.add("a", [7, 8], 3, sampling=sampling, min_tokens=2, stop_token_ids=(3,))
    made.turn(2)
    (row,) = made.backend.runners[0].rows.values()
    assert row.setup.sampling == sampling
    assert row.setup.suppressed == (3,)
    assert list(row.setup.prompt) == [7, 8]
    assert made.marks[-1] == "a"
    made.until_quiet()
    made.close()


@pytest.mark.parametrize(("grace_s", "finish"), [(100.0, FinishReason.LENGTH), (0.02, FinishReason.ERROR)])
def test_loop_shutdown_waits_for_grace_period(grace_s: float, finish: FinishReason) -> None:
    made = stage("a")
    answer = made.add("a", [4], 50)
    made.turn(5)
    made.shutdown(grace_s)
    made.turn()
    late = made.add("a", [4], 4)
    for _ in range(200):
        if made.loop.done:
            break
        made.turn()
    assert made.loop.done
    made.loop.run()
    assert answer.finish is finish
    assert error_of(late)[0] == "UNAVAILABLE"
    assert made.backend.mapped == 0


def test_loop_emits_stats_every_second_and_on_changes() -> None:
    made = stage("ab", turn_s=0.01)
    made.turn(5)
    before = len(made.of(EngineStats))
    made.turn(100)
    assert len(made.of(EngineStats)) - before == 1
    made.unload("b")
    made.turn()
    stats = made.of(EngineStats)[-1]
    assert isinstance(stats, EngineStats)
    assert [m.model_id for m in stats.models] == ["a"]
    assert stats.device_used_bytes == 4 * 4096
    made.close()
