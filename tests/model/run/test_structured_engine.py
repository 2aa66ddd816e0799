"""The engine with llguidance and random weights: every finished document is valid, with any other parameters and any other rows in the batch."""

import json
import random
from pathlib import Path

import jsonschema
import msgspec
import pytest
from tokenizers import Tokenizer

from runtime.text.constraint import Choice, Constraint, JsonSchema, Regex, Wanted
from runtime.text.grammar import answer_grammar
from runtime.types import (
    Checkpoint,
    FinishReason,
    GenerationRequest,
    Grammar,
    LogprobParams,
    ReasoningBudget,
    SamplingParams,
    StopParams,
)
from tests.support.checkpoints import tiny_llama
from tests.support.real_engine import run_engine
from tests.support.schemas import random_schema

GREEDY = SamplingParams(temperature=0.0)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "m", seed=3)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(str(folder), tuple(map(str, folder.glob("*.safetensors"))), dtype="float32")


def asked(
    constraint: Constraint | None,
    *,
    sampling: SamplingParams = GREEDY,
    prompt: int = 65,
    max_tokens: int = 300,
    logprobs: int | None = None,
    **stop: object,
) -> GenerationRequest:
    grammar = None if constraint is None else Grammar(answer_grammar(Wanted(constraint, "f"))[0])
    return GenerationRequest(
        prompt=(prompt, 66, 67), sampling=sampling, stop=StopParams(max_tokens, **stop), logprobs=LogprobParams(logprobs), grammar=grammar  # type: ignore[arg-type]
    )  # fmt: skip


def texts(folder: Path, requests: list[GenerationRequest]) -> list[tuple[str, FinishReason | None]]:
    run = run_engine(checkpoint(folder), requests)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    finishes = [rows[-1].finish for rows in run.rows]
    return list(zip([tokenizer.decode(tokens) for tokens in run.texts()], finishes, strict=True))


def test_random_schemas_and_random_weights_give_valid_documents(folder: Path) -> None:
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(60)]
    requests = [
        asked(JsonSchema(schema), sampling=SamplingParams(temperature=1.0, seed=seed), prompt=seed % 200)
        for seed, schema in enumerate(schemas)
    ]
    finished = 0
    for schema, (text, finish) in zip(schemas, texts(folder, requests), strict=True):
        if finish is FinishReason.EOS:
            jsonschema.validate(json.loads(text), schema)
            finished += 1
        else:
            assert finish is FinishReason.LENGTH
    assert finished > 40


def test_guided_text_does_not_depend_on_its_batch(folder: Path) -> None:
    guided = [asked(JsonSchema(SCHEMA), prompt=60 + index) for index in range(5)]
    plain = [asked(None, prompt=90 + index, max_tokens=60, ignore_eos=True) for index in range(5)]
    alone = [texts(folder, [request])[0] for request in guided]
    together = texts(folder, [*guided, *plain])
    assert together[:5] == alone
    assert together[5:] == texts(folder, plain)


@pytest.mark.parametrize(
    "request_",
    [
        asked(JsonSchema(SCHEMA), min_tokens=250),
        asked(JsonSchema(SCHEMA), ignore_eos=True),
        asked(JsonSchema(SCHEMA), logprobs=3),
        asked(JsonSchema(SCHEMA), sampling=SamplingParams(temperature=0.0, logit_bias=((257, 100.0), (1, 50.0)))),
        asked(JsonSchema(SCHEMA), sampling=SamplingParams(temperature=0.0, repetition_penalty=1.5)),
        asked(JsonSchema(SCHEMA), sampling=SamplingParams(temperature=2.0, top_k=1, seed=1)),
        asked(JsonSchema(SCHEMA), sampling=SamplingParams(temperature=0.0, allowed_token_ids=(1, 2, 3))),
    ],
    ids=["min_tokens", "ignore_eos", "logprobs", "logit_bias", "repetition_penalty", "top_k", "allowed_token_ids"],
)
def test_grammar_has_precedence_over_other_parameters(folder: Path, request_: GenerationRequest) -> None:
    run = run_engine(checkpoint(folder), [request_])
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(run.texts()[0])
    assert run.rows[0][-1].finish is FinishReason.EOS
    jsonschema.validate(json.loads(text), SCHEMA)
    if request_.logprobs.generated is not None:
        entries = [entry for row in run.rows[0] for entry in row.logprobs or ()]
        assert len(entries) == len(run.texts()[0])


def test_grammar_kinds_are_enforced_and_broken_ones_end_their_sequence(folder: Path) -> None:
    found = texts(folder, [asked(Choice(("yes", "no"))), asked(Regex("[0-9]{3}-[a-z]{2}"))])
    assert found[0][0] in ("yes", "no")
    assert found[1][0][3] == "-"
    assert [finish for _, finish in found] == [FinishReason.EOS, FinishReason.EOS]


def test_reasoning_ends_at_its_budget_beside_other_rows(folder: Path) -> None:
    budget = ReasoningBudget(5, 40, starts_in_reasoning=True)
    free = asked(None, max_tokens=12, ignore_eos=True)
    limited = msgspec.structs.replace(free, reasoning_budget=budget)
    run = run_engine(checkpoint(folder), [limited, free])
    together = run.texts()
    assert together[1] == run_engine(checkpoint(folder), [free]).texts()[0]
    assert together[0][:6] == [*together[1][:5], 40]
    assert len(together[0]) == 12
    assert run.num_steps == 6  # the steps behind the closing token have no masks


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, top_k=50, seed=5), SamplingParams(temperature=0.0, repetition_penalty=1.3)])  # fmt: skip
def test_text_behind_ended_reasoning_is_as_without_a_budget(folder: Path, sampling: SamplingParams) -> None:
    budget = ReasoningBudget(5, 40, starts_in_reasoning=True)
    free = asked(None, max_tokens=12, ignore_eos=True, sampling=sampling)
    [text] = run_engine(checkpoint(folder), [msgspec.structs.replace(free, reasoning_budget=budget)]).texts()
    from_here = msgspec.structs.replace(free, prompt=(*free.prompt, *text[:6]), stop=StopParams(6, ignore_eos=True))
    assert run_engine(checkpoint(folder), [from_here]).texts() == [text[6:]]
