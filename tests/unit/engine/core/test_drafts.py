"""Speculation in the engine loop: drafts change how many steps a text takes, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.operations import Operation, RunStep
from runtime.engine.scheduler.outputs import verified
from runtime.types import FinishReason, LogprobParams
from tests.support.drafting import FakeDrafter
from tests.support.engine_stage import Stage
from tests.support.fake_backend import FakeBackend
from tests.support.fake_specs import FakeSpec
from tests.support.random_life import run_life, seeds_of_long_runs

TOKENS = st.integers(0, 2)


@given(st.lists(TOKENS, max_size=5), st.lists(TOKENS, min_size=6, max_size=6))
def test_verified_keeps_what_follows_right_drafts(drafts: list[int], draws: list[int]) -> None:
    drawn = draws[: len(drafts) + 1]
    kept = verified(drafts, drawn)
    assert kept == drawn[: len(kept)]
    assert kept[:-1] == drafts[: len(kept) - 1]
    assert len(kept) == len(drawn) or kept[-1] != drafts[len(kept) - 1]


def test_drafts_save_steps_and_keep_the_text() -> None:
    steps = {}
    for name, drafter in (("plain", None), ("drafts", FakeDrafter(["a"], 48))):
        operations: list[Operation] = []
        made = Stage(FakeBackend({"a": FakeSpec(eos=())}), record=operations.append, drafter=drafter)
        made.load("a")
        made.until_quiet()
        made.add("a", [5, 6], 31, logprobs=LogprobParams(generated=0))
        made.until_quiet()
        made.check_all()
        plans = [operation.plan for operation in operations if isinstance(operation, RunStep)]
        steps[name] = len(plans)
        assert made.stats().models[0].generated_tokens_total == 31
        made.close()
    assert steps == {"plain": 31, "drafts": 11}  # of three tokens each, but the last


def test_drafts_end_at_a_stop_among_them() -> None:
    made = Stage(FakeBackend({"a": FakeSpec(vocab=12, eos=(0,))}), drafter=FakeDrafter(["a"], 12))
    made.load("a")
    made.until_quiet()
    for i in range(12):
        made.add("a", [i, 3], 60, min_tokens=2, stop_token_ids=(5,))
    made.until_quiet()
    made.check_all()
    assert {answer.finish for answer in made.answers.values()} == {FinishReason.EOS, FinishReason.STOP_TOKEN}
    made.close()


@pytest.mark.parametrize("seed", [*range(6), *seeds_of_long_runs(6, 12)])
def test_random_lives_with_drafts_and_grammars(seed: int) -> None:
    made = run_life(seed, 250, varied=True, drafter=FakeDrafter(("ada", "bob", "cyd"), 40))
    made.check_all()
    made.close()
