"""fmaas.GenerationService through its stubs: message sequences, stop reasons, seeds, details, limits and texts of errors."""

import math
from pathlib import Path

import grpc
import grpc.aio
import pytest

from common.model_key import DefaultSampling, ModelSettings
from runtime.interfaces import ServedModel
from runtime.types import FinishReason
from tests.support.inference_server import CONFIG, TEXT, Services, batch, generate, serve_grpc, single
from tests.support.scripted_engine import ScriptedEngine, served
from tests.support.waiting import until
from wire.fmaas import generation_pb2 as pb


async def test_generate_batches_of_none_and_of_too_many(services: Services) -> None:
    assert len((await services.tgis.Generate(pb.BatchedGenerationRequest())).responses) == 0
    with pytest.raises(
        grpc.aio.AioRpcError, match="model m1: 2049 prompts make 2049 sequences; the limit of a request is 2048"
    ):
        await services.tgis.Generate(batch(*["a"] * 2049))
    assert not services.engine.asked


async def test_generate_defaults_are_greedy_up_to_the_servers_limit(services: Services) -> None:
    answer = await generate(services)
    assert answer.text == TEXT
    assert answer.stop_reason == pb.EOS_TOKEN
    assert answer.stop_sequence == ""
    assert answer.seed == 0
    assert answer.generated_token_count == len(services.script(TEXT)) + 1
    assert answer.input_token_count == len(services.script("The fox"))
    asked = services.engine.asked[0]
    assert asked.request.sampling.greedy
    assert asked.request.stop.max_tokens == 169
    assert not asked.request.stop.stop_token_ids


async def test_generate_length_stops_tell_the_servers_limit_from_the_requests(
    services: Services, model_dir: Path
) -> None:
    services.engine.script = lambda asked: [5] * 1000
    asked_for = await generate(services, stopping=pb.StoppingCriteria(max_new_tokens=4))
    assert (asked_for.stop_reason, asked_for.generated_token_count) == (pb.MAX_TOKENS, 4)
    assert (await generate(services)).stop_reason == pb.TOKEN_LIMIT
    long = "a " * 90
    num = len(services.script(long))
    clipped = await generate(services, long, stopping=pb.StoppingCriteria(max_new_tokens=169))
    assert (clipped.stop_reason, clipped.generated_token_count) == (pb.TOKEN_LIMIT, 200 - num)
    with_default = served(model_dir, "m2", settings=ModelSettings(sampling=DefaultSampling(max_tokens=20)))
    async with serve_grpc(ScriptedEngine(lambda asked: [5] * 1000), with_default, config=CONFIG) as other:
        answer = await generate(other)
        assert (answer.stop_reason, answer.generated_token_count) == (pb.MAX_TOKENS, 20)


async def test_generate_limits_each_input_by_its_own_length(services: Services) -> None:
    services.engine.script = lambda asked: [5] * 1000
    long = "a " * 90
    answer = await services.tgis.Generate(batch(long, "a", stopping=pb.StoppingCriteria(max_new_tokens=150)))
    assert [each.stop_reason for each in answer.responses] == [pb.TOKEN_LIMIT, pb.MAX_TOKENS]
    assert answer.responses[1].generated_token_count == 150


async def test_generate_returns_the_seeds(services: Services) -> None:
    answer = await services.tgis.Generate(batch("a", "a", "a", "a", "a", method=pb.SAMPLE))
    seeds = [each.seed for each in answer.responses]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert sorted(seeds) == sorted(asked.request.sampling.seed for asked in services.engine.asked)
    given = await generate(
        services, method=pb.SAMPLE, sampling=pb.SamplingParameters(seed=2**63 + 5, top_k=3, typical_p=0.5)
    )
    assert given.seed == 2**63 + 5
    asked = services.engine.asked[-1]
    assert (
        asked.request.sampling.top_k,
        asked.request.sampling.typical_p,
        asked.request.sampling.top_p,
        asked.request.sampling.temperature,
    ) == (
        3,
        0.5,
        1.0,
        1.0,
    )
    greedy = await generate(services, method=pb.SAMPLE, sampling=pb.SamplingParameters(temperature=0.0, seed=3))
    assert greedy.seed == 0
    assert services.engine.asked[-1].request.sampling.greedy


@pytest.mark.parametrize(
    ("stops", "include", "text", "stop"),
    [
        (["confused"], None, TEXT[: TEXT.index(" 🤖")], "confused"),
        ([" movie"], False, "The first time I saw the", " movie"),
        (["confu"], True, TEXT[: TEXT.index("sed")], "confu"),
        (
            ["w the movie, I was a little bit confused"],
            False,
            "The first time I sa",
            "w the movie, I was a little bit confused",
        ),
        (["🤖"], True, TEXT[: TEXT.index(".")], "🤖"),
        (["never", "I was"], False, TEXT[: TEXT.index("I was")], "I was"),
    ],
)
async def test_generate_stop_sequences(
    services: Services, stops: list[str], include: bool | None, text: str, stop: str
) -> None:
    stopping = pb.StoppingCriteria(stop_sequences=stops, max_new_tokens=100)
    if include is not None:
        stopping.include_stop_sequence = include
    answer = await generate(services, stopping=stopping)
    assert (answer.text, answer.stop_sequence, answer.stop_reason) == (text, stop, pb.STOP_SEQUENCE)
    assert services.engine.asked[0].closed
    streamed = [each async for each in services.tgis.GenerateStream(single(stopping=stopping))]
    assert "".join(each.text for each in streamed) == text
    assert streamed[-1].generated_token_count == answer.generated_token_count
    assert (streamed[-1].stop_sequence, streamed[-1].stop_reason) == (stop, pb.STOP_SEQUENCE)


async def test_generate_stop_sequence_at_the_last_token_is_a_length_stop(services: Services) -> None:
    upto = TEXT[: TEXT.index(" movie") + len(" movie")]
    stopping = pb.StoppingCriteria(
        stop_sequences=[upto[-3:]], include_stop_sequence=False, max_new_tokens=len(services.script(upto))
    )
    answer = await generate(services, stopping=stopping)
    assert (answer.stop_reason, answer.text) == (pb.MAX_TOKENS, upto)


async def test_generate_min_new_tokens_delay_stop_sequences(services: Services) -> None:
    stopping = pb.StoppingCriteria(stop_sequences=["first", "bit"], min_new_tokens=12, max_new_tokens=100)
    answer = await generate(services, stopping=stopping)
    assert answer.stop_sequence == "bit"
    assert services.engine.asked[0].request.stop.min_tokens == 12


async def test_generate_stream_message_order(services: Services) -> None:
    request = single(
        method=pb.SAMPLE,
        response=pb.ResponseOptions(input_text=True, input_tokens=True, generated_tokens=True, token_logprobs=True, token_ranks=True, top_n_tokens=2),
    )  # fmt: skip
    first, inputs, *rest = [each async for each in services.tgis.GenerateStream(request)]
    num_input = len(services.script("The fox"))
    assert (first.input_token_count, first.text, first.generated_token_count, first.stop_reason) == (
        num_input,
        "The fox",
        0,
        0,
    )
    assert first.seed != 0
    assert len(inputs.input_tokens) == inputs.input_token_count == num_input
    assert inputs.text == ""
    assert math.isnan(inputs.input_tokens[0].logprob)
    assert inputs.input_tokens[0].rank == 0
    assert inputs.input_tokens[1].rank == 2
    assert [len(each.tokens) for each in rest] == [1] * len(rest)
    assert [each.generated_token_count for each in rest] == list(range(1, len(rest) + 1))
    assert all(each.seed == 0 and each.stop_reason == 0 and each.input_token_count == 0 for each in rest[:-1])
    assert (rest[-1].seed, rest[-1].stop_reason) == (first.seed, pb.EOS_TOKEN)
    assert "".join(each.text for each in rest) == TEXT
    assert [each.tokens[0].text for each in rest] == [
        services.model.text.piece(token) for token in [*services.script(TEXT), 0]
    ]
    assert rest[3].tokens[0].logprob == -1.5
    assert [top.logprob for top in rest[3].tokens[0].top_tokens] == [-0.5, -1.5]


async def test_generate_stream_splits_merged_rows(services: Services) -> None:
    services.engine.per_row = 7
    request = single(response=pb.ResponseOptions(generated_tokens=True))
    _, *rest = [each async for each in services.tgis.GenerateStream(request)]
    assert [each.generated_token_count for each in rest] == list(range(1, len(services.script(TEXT)) + 2))
    assert "".join(each.text for each in rest) == TEXT


async def test_generate_stream_without_details_sends_only_text(services: Services) -> None:
    first, *rest = [each async for each in services.tgis.GenerateStream(single())]
    assert (first.text, first.seed) == ("", 0)
    assert all(each.text or each.stop_reason for each in rest)
    assert "".join(each.text for each in rest) == TEXT


async def test_generate_details(services: Services) -> None:
    options = pb.ResponseOptions(input_text=True, generated_tokens=True, input_tokens=True, top_n_tokens=1)
    answer = await generate(services, response=options, stopping=pb.StoppingCriteria(max_new_tokens=2))
    assert answer.text.startswith("The foxThe")
    assert len(answer.tokens) == 2
    assert answer.tokens[0].logprob == 0
    assert len(answer.tokens[0].top_tokens) == 1
    assert answer.tokens[0].top_tokens[0].logprob == 0
    assert not answer.input_tokens[0].top_tokens


async def test_generate_truncation_keeps_the_last_tokens_and_bos(services: Services, llama: ServedModel) -> None:
    text = "the dog the dog"
    answer = await generate(services, text, truncate_input_tokens=2, response=pb.ResponseOptions(input_text=True))
    assert services.engine.asked[0].request.prompt == tuple(services.script(text)[-2:])
    assert answer.input_token_count == 2
    assert answer.text.startswith(text)
    async with serve_grpc(ScriptedEngine(lambda asked: [5]), llama, config=CONFIG) as other:
        await generate(other, text, truncate_input_tokens=3)
        assert other.engine.asked[0].request.prompt == (1, *other.script(text)[-2:])
        await generate(other, text, truncate_input_tokens=1)
        assert other.engine.asked[1].request.prompt == (1,)


@pytest.mark.parametrize("limit_ms", [1, 150])
async def test_generate_time_limit(services: Services, limit_ms: int) -> None:
    services.engine.step_s = 0.02
    services.engine.script = lambda asked: [5] * 1000
    stopping = pb.StoppingCriteria(time_limit_millis=limit_ms)
    answer = await generate(services, stopping=stopping)
    assert answer.stop_reason == pb.TIME_LIMIT
    assert 1 <= answer.generated_token_count < 100
    streamed = [each async for each in services.tgis.GenerateStream(single(stopping=stopping))]
    assert streamed[-1].stop_reason == pb.TIME_LIMIT
    assert all(asked.closed for asked in services.engine.asked)


async def test_generate_time_limit_of_a_request_that_never_starts(services: Services) -> None:
    services.engine.step_s = 60
    answer = await generate(services, stopping=pb.StoppingCriteria(time_limit_millis=10))
    assert (answer.stop_reason, answer.generated_token_count) == (pb.TIME_LIMIT, 0)


async def test_generate_drops_an_incomplete_character_at_the_end(services: Services) -> None:
    services.engine.script = lambda asked: services.script("a🤖")[:-1]
    assert (await generate(services)).text == "a"


async def test_generate_of_an_unloaded_model_is_cancelled(services: Services) -> None:
    services.engine.finish_with = FinishReason.ABORTED
    services.engine.script = lambda asked: [5]
    assert (await generate(services)).stop_reason == pb.CANCELLED


async def test_generate_stream_cancellation_frees_the_rows(services: Services) -> None:
    services.engine.step_s = 0.01
    services.engine.script = lambda asked: [5] * 1000
    call = services.tgis.GenerateStream(single())
    await call.read()
    await call.read()
    call.cancel()
    unary = services.tgis.Generate(batch("a", "b"))
    await until(lambda: len(services.engine.asked) == 3)
    unary.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch("a"), timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: [asked.closed for asked in services.engine.asked] == [True] * 4)
    assert all(asked.sent < 160 for asked in services.engine.asked)


async def test_tokenize(services: Services, llama: ServedModel) -> None:
    text = "Köln dog"
    request = pb.BatchedTokenizeRequest(
        requests=[pb.TokenizeRequest(text=text)], return_tokens=True, return_offsets=True
    )
    found = (await services.tgis.Tokenize(request)).responses[0]
    assert found.token_count == len(found.tokens) == len(found.offsets) == len(services.script(text))
    assert found.offsets[-1].end == len(text)
    request.truncate_input_tokens = 2
    short = (await services.tgis.Tokenize(request)).responses[0]
    assert (short.token_count, list(short.tokens)) == (2, list(found.tokens)[-2:])
    async with serve_grpc(ScriptedEngine(lambda asked: [5]), llama, config=CONFIG) as other:
        with_bos = (await other.tgis.Tokenize(request)).responses[0]
        assert with_bos.tokens[0] == "<s>"
        assert (with_bos.offsets[0].start, with_bos.offsets[0].end) == (0, 0)


async def test_model_info(services: Services) -> None:
    info = await services.tgis.ModelInfo(pb.ModelInfoRequest())
    assert (info.model_kind, info.max_sequence_length, info.max_new_tokens) == (
        pb.ModelInfoResponse.DECODER_ONLY,
        200,
        169,
    )
