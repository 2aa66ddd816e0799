"""Rows whose logits are not finite end with an error, and rows beside them and after them are as they would be without."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from runtime.ipc.messages import RowTokens
from runtime.types import (
    Checkpoint,
    FinishReason,
    GenerationRequest,
    LogprobParams,
    Pooling,
    SamplingParams,
    StopParams,
)
from tests.support.families import family
from tests.support.oracle import reference
from tests.support.real_engine import RealEngine

BAD = 77  # the token whose embedding is not finite
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=3)
EDITED = SamplingParams(temperature=0.0, repetition_penalty=1.2)


def asked(prompt: list[int], sampling: SamplingParams = GREEDY, max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(prompt=tuple(prompt), sampling=sampling, stop=StopParams(max_tokens, ignore_eos=True))


def ending(rows: list[RowTokens]) -> tuple[FinishReason | None, str | None]:
    return rows[-1].finish, rows[-1].error_code


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RealEngine]:
    model = family("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD, 3] = request.param
    model.save_pretrained(tmp_path)
    made = RealEngine()
    made.load("m", Checkpoint(str(tmp_path), tuple(map(str, tmp_path.glob("*.safetensors"))), dtype="float32"))
    yield made
    made.close()


@pytest.mark.parametrize("engine", [float("nan"), float("inf")], indirect=True)
def test_rows_without_finite_logits_end_with_an_error_alone(engine: RealEngine) -> None:
    model = family("llama")
    good = [list(range(1 + 7 * i, 20 + 7 * i)) for i in range(4)]
    expected = [reference(model, prompt, 12) for prompt in good]
    bad = [[5, BAD, 6], list(range(60, 100)), [BAD]]
    mixed = [asked(prompt) for prompt in good] + [asked(p, s) for p in bad for s in (GREEDY, SAMPLED, EDITED)]
    for _ in range(2):  # blocks of the first round are used again
        found = engine.run([("m", request) for request in mixed], may_fail=True)
        assert [[t for row in rows for t in row.tokens] for rows in found[:4]] == expected
        for rows in found[4:]:
            assert ending(rows) == (FinishReason.ERROR, "INTERNAL")
            assert [row.tokens for row in rows] == [()]
            assert "infinite or not a number" in str(rows[-1].error)
    stats = engine.loop.table.stats().models[0]
    assert stats.generated_tokens_total == 2 * 4 * 12
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("engine", [float("nan")], indirect=True)
def test_token_that_spoils_the_next_logits_ends_the_row_after_it(engine: RealEngine) -> None:
    forced = msgspec.structs.replace(GREEDY, allowed_token_ids=(BAD,))
    found = engine.run([("m", asked([1, 2, 3], forced)), ("m", asked([1, 2, 3]))], may_fail=True)
    assert [row.tokens for row in found[0]] == [(BAD,), ()]
    assert ending(found[0]) == (FinishReason.ERROR, "INTERNAL")
    assert "after 3 prompt tokens and 1 output tokens" in str(found[0][-1].error)
    assert ending(found[1]) == (FinishReason.LENGTH, None)


@pytest.mark.parametrize("engine", [float("nan")], indirect=True)
@pytest.mark.parametrize("pooling", Pooling)
def test_vector_that_is_not_finite_is_an_error(engine: RealEngine, pooling: Pooling) -> None:
    def pooled(prompt: list[int]) -> GenerationRequest:
        return msgspec.structs.replace(asked(prompt, max_tokens=0), pooling=(pooling,))

    bad, good = engine.run([("m", pooled([BAD, 1, 2])), ("m", pooled([3, 1, 2]))], may_fail=True)
    assert (ending(bad), bad[-1].vector) == ((FinishReason.ERROR, "INTERNAL"), None)
    assert (ending(good), good[-1].vector is None) == ((FinishReason.LENGTH, None), False)


@pytest.mark.parametrize("engine", [float("nan")], indirect=True)
def test_log_probabilities_of_a_prompt_that_are_no_numbers_are_an_error(engine: RealEngine) -> None:
    scored = msgspec.structs.replace(asked([4, BAD, 5], max_tokens=0), logprobs=LogprobParams(prompt=1))
    drawn = msgspec.structs.replace(asked([4, BAD, 5]), logprobs=LogprobParams(generated=1))
    for rows in engine.run([("m", scored), ("m", drawn)], may_fail=True):
        assert ending(rows) == (FinishReason.ERROR, "INTERNAL")
        assert rows[-1].prompt_logprobs is None
