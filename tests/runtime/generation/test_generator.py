"""Sequences and the generator: what comes out does not depend on how the engine's rows are cut; leaving, limits and failures free rows."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.model_key import ModelSettings
from runtime.engine_client.streams import merge_rows
from runtime.errors import (
    ContextExceeded,
    EngineFault,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RepertoryError,
    Unavailable,
)
from runtime.generation.generator import Generator
from runtime.generation.limits import check_chars, check_prompt, draw_seed, engine_seed, output_limit, within_float32
from runtime.generation.merge import merge
from runtime.generation.parser import PlainText
from runtime.generation.parts import Completed, Delta, join
from runtime.generation.sequence import RunningSequence, split_tokens
from runtime.interfaces import ServedModel
from runtime.ipc.messages import RowTokens
from runtime.observability.metrics import RuntimeMetrics
from runtime.text.text_model import TextModel, load_text
from runtime.types import FinishReason, GenerationRequest, LogprobParams, SamplingParams, StopParams
from tests.support import tokenizers as tiny
from tests.support.scripted_engine import ScriptedEngine, entry, served
from tests.support.waiting import until

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return served(tiny.byte_level(tmp_path_factory.mktemp("m")), "m1")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[TextModel]:
    folder = tmp_path_factory.mktemp("t")
    return [load_text(kind(folder / kind.__name__), ModelSettings()) for kind in (tiny.byte_level, tiny.sentencepiece)]


def request_of(*, max_tokens: int = 100, index: int = 0, **fields: object) -> GenerationRequest:
    return GenerationRequest(prompt=(5, 6), sampling=GREEDY, stop=StopParams(max_tokens), index=index, **fields)  # type: ignore[arg-type]


def play(model: ServedModel, request: GenerationRequest, rows: list[RowTokens]) -> Completed:
    sequence = RunningSequence(
        request, model.text.detokenizer(request.prompt), PlainText(), model.text.special_tokens(request.stop_strings)
    )
    deltas: list[Delta] = []
    for row in rows:
        deltas += sequence.push(row)
        if deltas and deltas[-1].finish is not None:
            break
    assert [delta.num_generated for delta in deltas] == [
        sum(len(d.tokens) for d in deltas[: i + 1]) for i in range(len(deltas))
    ]
    return join(deltas)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_running_sequence_is_independent_of_row_boundaries(model: ServedModel, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(1, model.text.vocab_size - 1), min_size=1, max_size=25))
    ended_by_eos = data.draw(st.booleans())
    details = data.draw(st.sampled_from([None, 0, 2]))
    text = model.text.decode(tokens)
    pieces = [text[at : at + size] for at in range(len(text)) for size in (1, 2, 3)] or ["x"]
    stops = tuple(data.draw(st.lists(st.sampled_from([*pieces, "<|im_end|>"]), max_size=2)))
    request = request_of(
        stop_strings=stops,
        include_stop=data.draw(st.booleans()),
        stops_by_list=True,
        logprobs=LogprobParams(generated=details),
    )
    if ended_by_eos:
        tokens = [*tokens, 0]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=6)) | {len(tokens)})
    rows: list[RowTokens] = []
    for start, end in zip([0, *cuts], cuts, strict=False):
        last = end == len(tokens)
        part = tuple(tokens[start:end])
        rows.append(
            RowTokens(
                1,
                part,
                (FinishReason.EOS if ended_by_eos else FinishReason.LENGTH) if last else None,
                0 if last and ended_by_eos else None,
                logprobs=None if details is None else tuple(entry(token, details) for token in part),
                cached_tokens=1 if start == 0 else None,
            )
        )
    whole = play(model, request, rows)
    single = play(model, request, [part for row in rows for part in split_tokens(row)])
    assert whole == single
    assert text.startswith(whole.text.removesuffix("<|im_end|>"))
    if whole.finish is not FinishReason.STOP_STRING:
        assert whole.text == text
        assert list(whole.tokens) == tokens
    if details is not None:
        assert len(whole.logprobs) == len(whole.offsets) == len(whole.tokens)


def test_split_tokens_merged_again_is_the_same_row() -> None:
    details = (entry(5, 1), entry(6, 1), entry(7, 1))
    row = RowTokens(3, (5, 6, 7), FinishReason.STOP_TOKEN, 7, details, (None, entry(4, 0)), 2, "INTERNAL", "why", 0.25)
    parts = split_tokens(row)
    assert [part.tokens for part in parts] == [(5,), (6,), (7,)]
    assert merge_rows(parts) == row


def test_running_sequence_shows_a_stop_token_only_on_request(model: ServedModel) -> None:
    row = RowTokens(1, (5, 9), FinishReason.STOP_TOKEN, 9)
    assert play(model, request_of(), [row]).text == model.text.decode([5])
    assert play(model, request_of(show_stop_token=True), [row]).text == model.text.decode([5, 9])
    bare = RowTokens(1, (5,), FinishReason.STOP_TOKEN, 9)  # an engine that leaves the stop token out
    assert play(model, request_of(), [bare]).text == model.text.decode([5])


@pytest.mark.parametrize(("include", "text"), [(False, "the dog"), (True, "the dog<|im_end|>")])
def test_running_sequence_finds_a_stop_string_that_is_a_special_token(
    model: ServedModel, include: bool, text: str
) -> None:
    row = RowTokens(1, (*model.text.encode("the dog"), 2, 5, 2, 5), FinishReason.LENGTH)
    request = request_of(
        stop_strings=("dogs", "<|im_end|>"), include_stop=include
    )  # what "dogs" held back is shown after all
    found = play(model, request, [row])
    assert (found.text, found.finish, found.stop) == (text, FinishReason.STOP_STRING, "<|im_end|>")
    assert found.tokens == row.tokens[: row.tokens.index(2) + 1]
    least = msgspec.structs.replace(request, stop=StopParams(100, min_tokens=len(row.tokens) - 1))
    assert play(model, least, [row]).tokens == row.tokens[:-1]


def test_running_sequence_prefers_a_stop_string_to_the_length(model: ServedModel) -> None:
    tokens = tuple(model.text.encode("the dog"))
    row = RowTokens(1, tokens, FinishReason.LENGTH)
    assert (
        play(model, request_of(stop_strings=("dog",), max_tokens=len(tokens)), [row]).finish is FinishReason.STOP_STRING
    )
    length_first = request_of(stop_strings=("dog",), max_tokens=len(tokens), length_before_stop=True)
    assert play(model, length_first, [row]).finish is FinishReason.LENGTH
    assert play(model, length_first, [row]).text == "the dog"


async def test_complete_counts_tokens_whose_text_is_held_back(model: ServedModel) -> None:
    tokens = model.text.encode("a STOP STO")
    generator = Generator(ScriptedEngine(lambda asked: [*tokens, 0]), RuntimeMetrics())
    [result] = await generator.complete(model, [request_of(stop_strings=("STOP STOP",))])
    assert (result.text, list(result.tokens)) == ("a STOP STO", [*tokens, 0])


async def test_complete_runs_sequences_at_once_and_returns_them_in_order(model: ServedModel) -> None:
    engine = ScriptedEngine(
        lambda asked: [asked.request.stop.max_tokens] * asked.request.stop.max_tokens, eos=-1, step_s=0.001
    )
    requests = [request_of(index=index, max_tokens=5 + index) for index in range(5)]
    results = await Generator(engine, RuntimeMetrics()).complete(model, requests)
    assert [len(result.tokens) for result in results] == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("count", [1, 3])
async def test_stream_close_frees_all_rows(model: ServedModel, count: int) -> None:
    engine = ScriptedEngine(lambda asked: [5] * 1000, step_s=0.001)
    generator = Generator(engine, RuntimeMetrics())
    deltas = generator.stream(model, [request_of(index=index, max_tokens=1000) for index in range(count)])
    await anext(deltas)
    await deltas.aclose()  # type: ignore[attr-defined]
    await until(lambda: len(engine.asked) == count and all(asked.closed for asked in engine.asked))


async def test_complete_failure_frees_the_other_rows(model: ServedModel) -> None:
    engine = ScriptedEngine(lambda asked: [5] * 1000, step_s=0.001)
    real = engine.generate

    def generate(model_id: str, request: GenerationRequest) -> AsyncIterator[RowTokens]:
        if len(engine.asked) == 2:
            engine.raises = ModelNotFound("gone")
        return real(model_id, request)

    engine.generate = generate  # type: ignore[method-assign]
    with pytest.raises(ModelNotFound):
        await Generator(engine, RuntimeMetrics()).complete(
            model, [request_of(index=index, max_tokens=1000) for index in range(4)]
        )
    assert all(asked.closed or asked.sent == 0 for asked in engine.asked)


@pytest.mark.parametrize(
    ("code", "kind"), [("UNAVAILABLE", Unavailable), ("INTERNAL", EngineFault), ("RESOURCE_EXHAUSTED", Overloaded)]
)
async def test_complete_raises_the_engines_kind_of_error(model: ServedModel, code: str, kind: type[Exception]) -> None:
    engine = ScriptedEngine(lambda asked: [5] * 10, fail_after=2, fail_with=(code, "why"))
    with pytest.raises(kind, match="why"):
        await Generator(engine, RuntimeMetrics()).complete(model, [request_of()])


async def test_complete_concurrency_limit_counts_waiting_and_running(model: ServedModel, tmp_path: Path) -> None:
    limited = served(tiny.byte_level(tmp_path), "m2", settings=ModelSettings(max_concurrency=2))
    engine = ScriptedEngine(lambda asked: [5] * 1000, step_s=0.001)
    generator = Generator(engine, RuntimeMetrics())
    running = asyncio.create_task(
        generator.complete(limited, [request_of(index=index, max_tokens=1000) for index in range(2)])
    )
    await until(lambda: len(engine.asked) == 2)
    with pytest.raises(Overloaded, match="its limit is 2") as caught:
        await generator.complete(limited, [request_of()])
    assert caught.value.retry_after_s is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    engine.script = lambda asked: [5]
    assert len(await generator.complete(limited, [request_of(), request_of(index=1)])) == 2


async def test_merge_raises_the_first_failure_and_closes_the_rest() -> None:
    closed: list[int] = []

    async def endless(number: int) -> AsyncIterator[int]:
        try:
            while True:
                await asyncio.sleep(0)
                yield number
        finally:
            closed.append(number)

    async def failing() -> AsyncIterator[int]:
        yield 9
        raise ValueError("broke")

    async def drain() -> None:
        async for _ in merge([endless(1), failing(), endless(2)]):
            pass

    with pytest.raises(ValueError, match="broke"):
        await drain()
    assert sorted(closed) == [1, 2]


@pytest.mark.parametrize(
    ("num_prompt", "requested", "default", "limit"),
    [(150, 50, None, 50), (150, None, None, 50), (150, None, 7, 7), (199, None, 7, 1), (1, 199, 7, 199)],
)
def test_output_limit_is_what_was_requested_or_fits(
    model: ServedModel, num_prompt: int, requested: int | None, default: int | None, limit: int
) -> None:
    assert output_limit(model, [5] * num_prompt, requested, default) == limit


@pytest.mark.parametrize(
    ("num_prompt", "requested", "kind", "param", "limit", "value"),
    [
        (200, None, ContextExceeded, "messages", 200, 200),
        (0, None, InvalidRequest, "messages", None, None),
        (150, 51, ContextExceeded, "max_tokens", 200, 201),
        (150, 0, InvalidRequest, "max_tokens", 1, 0),
    ],
)
def test_output_limit_refuses_with_fields(
    model: ServedModel,
    num_prompt: int,
    requested: int | None,
    kind: type[RepertoryError],
    param: str,
    limit: int | None,
    value: int | None,
) -> None:
    with pytest.raises(kind, match=r"^model m1: ") as caught:
        output_limit(model, [5] * num_prompt, requested, None, prompt_param="messages")
    error = caught.value
    assert (error.model, error.param, error.limit, error.value) == ("m1", param, limit, value)


@settings(deadline=None)
@given(text=st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFFFF, exclude_categories=["Cs"])))
def test_most_chars_per_token_bounds_every_token(tokenizers: list[TextModel], text: str) -> None:
    for each in tokenizers:
        assert each.most_chars_per_token is not None
        assert len(text) <= len(each.encode(text)) * each.most_chars_per_token


def test_check_chars_refuses_what_cannot_fit(model: ServedModel, tmp_path: Path) -> None:
    longest = 200 * (model.text.most_chars_per_token or 0)
    check_chars(model, ["a", "b" * longest])
    with pytest.raises(ContextExceeded, match=f"200 tokens of at most .* the prompt has {longest + 1} characters"):
        check_chars(model, ["a", "b" * (longest + 1)])
    check_chars(served(tiny.word_pieces(tmp_path / "w"), "m2"), ["b" * 10**7])  # one unknown word is one token


def test_engine_seed_is_in_range() -> None:
    assert 0 <= draw_seed() < 2**32
    assert engine_seed(7, 2) == 9
    assert 0 <= engine_seed(2**64 - 1, 3) < 2**63
    assert 0 <= engine_seed(-5) < 2**63


@pytest.mark.parametrize(
    ("wild", "tame"),
    [
        (SamplingParams(top_k=2**40), SamplingParams(top_k=0)),
        (SamplingParams(temperature=1e-45), SamplingParams(temperature=0.0)),
        (SamplingParams(repetition_penalty=1e-300), SamplingParams(repetition_penalty=1e-6)),
        (SamplingParams(repetition_penalty=1e300), SamplingParams(repetition_penalty=1e6)),
        (
            SamplingParams(temperature=0.1, top_k=7, repetition_penalty=1.1),
            SamplingParams(temperature=0.1, top_k=7, repetition_penalty=1.1),
        ),
    ],
)
def test_within_float32_keeps_the_meaning(model: ServedModel, wild: SamplingParams, tame: SamplingParams) -> None:
    assert within_float32(model, wild) == tame


def test_check_prompt_refuses_a_token_that_only_the_tokenizer_has(model: ServedModel) -> None:
    """Llama 2's descendants have such a token: their [PAD] lies just above the embeddings."""
    last = model.facts.vocab_size - 1
    smaller = replace(model, facts=msgspec.structs.replace(model.facts, vocab_size=last))
    check_prompt(model, (5, last))
    with pytest.raises(InvalidRequest, match=f"model m1: the prompt has the token .*, id {last}, .* 0 to {last - 1}"):
        check_prompt(smaller, (5, last))
