"""What fmaas.GenerationService refuses, with TGIS' texts, and how failures of the engine reach its callers."""

import math
from typing import Any

import grpc
import grpc.aio
import pytest

from common.not_here import NOT_HERE_HEADER
from runtime.interfaces import ServedModel
from tests.support.inference_server import CONFIG, TEXT, Services, batch, generate, serve_grpc, single
from tests.support.scripted_engine import ScriptedEngine
from wire.fmaas import generation_pb2 as pb

BAD: list[tuple[dict[str, Any], str]] = [
    ({"decoding": pb.DecodingParameters(length_penalty=pb.DecodingParameters.LengthPenalty(decay_factor=0.5))},
     "length_penalty.decay_factor must be >= 1.0 and <= 10.0"),
    ({"method": 7}, "decoding method 7 does not exist"),
    ({"decoding": pb.DecodingParameters(repetition_penalty=-1)}, "repetition_penalty must be > 0.0"),
    ({"stopping": pb.StoppingCriteria(max_new_tokens=170)}, "max_new_tokens must be <= 169"),
    ({"stopping": pb.StoppingCriteria(min_new_tokens=5, max_new_tokens=4)}, "min_new_tokens must be <= max_new_tokens"),
    ({"stopping": pb.StoppingCriteria(stop_sequences=[""])},
     "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"),
    ({"stopping": pb.StoppingCriteria(stop_sequences=["é" * 121])},
     "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"),
    ({"stopping": pb.StoppingCriteria(stop_sequences=list("abcdefg"))},
     "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"),
    ({"response": pb.ResponseOptions(generated_tokens=True, top_n_tokens=11)}, "top_n_tokens (11) must be <= 10"),
    ({"response": pb.ResponseOptions(token_logprobs=True)}, "must request input and/or generated tokens to request extra token detail"),
    ({"sampling": pb.SamplingParameters(top_p=1.5)}, "top_p must be > 0.0 and <= 1.0"),
    ({"sampling": pb.SamplingParameters(top_p=math.nan)}, "top_p must be > 0.0 and <= 1.0"),
    ({"sampling": pb.SamplingParameters(typical_p=1.5)}, "typical_p must be <= 1.0"),
    ({"stopping": pb.StoppingCriteria(min_new_tokens=150)}, "input tokens (69) plus prefix length (0) plus min_new_tokens (150) must be <= 200"),
    ({"decoding": pb.DecodingParameters(choice=pb.DecodingParameters.StringChoices(choices=["a"]))}, "Must provide at least two choices"),
]  # fmt: skip


@pytest.mark.parametrize(("params", "text"), BAD)
async def test_check_refuses_bad_parameters(services: Services, params: dict[str, Any], text: str) -> None:
    prompt = "a"
    if "min_new_tokens (150)" in text:
        prompt = next(candidate for size in range(1, 600) if len(services.script(candidate := "\x01" * size)) == 69)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch(prompt, **params))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, text)
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        _ = [each async for each in services.tgis.GenerateStream(single(prompt, **params))]
    assert streamed.value.details() == text
    assert not services.engine.asked


async def test_plan_refuses_bad_prompt_lengths(services: Services) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch("\x01" * 200))
    assert caught.value.details() == "input tokens (200) plus prefix length (0) must be < 200"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch(""))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("params", "word"),
    [
        (
            {"decoding": pb.DecodingParameters(length_penalty=pb.DecodingParameters.LengthPenalty(decay_factor=1.5))},
            "length_penalty",
        ),
    ],
)
async def test_check_refuses_unsupported_features(services: Services, params: dict[str, Any], word: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch("a", **params))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert word in (caught.value.details() or "")


async def test_generate_constrains_and_refuses_wrong_grammars(services: Services) -> None:
    regex = pb.DecodingParameters(regex="a+")
    await services.tgis.Generate(batch("a", decoding=regex))
    single = pb.SingleGenerationRequest(request=pb.GenerationRequest(text="a"), params=pb.Parameters(decoding=regex))
    await services.tgis.GenerateStream(single).read()
    first, second = (asked.request.grammar for asked in services.engine.asked)
    assert first is not None
    assert (first, "a+" in first.text) == (second, True)
    for wrong in (pb.DecodingParameters(regex="("), pb.DecodingParameters(json_schema="{")):
        with pytest.raises(grpc.aio.AioRpcError, match=r"decoding\.(regex|json_schema)") as caught:
            await services.tgis.Generate(batch("a", decoding=wrong))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    one = pb.DecodingParameters(choice=pb.DecodingParameters.StringChoices(choices=["a"]))
    with pytest.raises(grpc.aio.AioRpcError, match="Must provide at least two choices"):
        await services.tgis.Generate(batch("a", decoding=one))


async def test_generate_refuses_unknown_adapters_and_accepts_plain_text_format(services: Services) -> None:
    adapter, prefix = pb.SingleGenerationRequest(adapter_id="x"), pb.SingleGenerationRequest(prefix_id="x")
    for field, request in (("adapter_id", adapter), ("prefix_id", prefix)):
        with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
            await services.tgis.GenerateStream(request).read()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    none = pb.BatchedGenerationRequest(prefix_id="", adapter_id="", requests=[pb.GenerationRequest(text="a")])
    assert len((await services.tgis.Generate(none)).responses) == 1
    plain = pb.DecodingParameters(format=pb.DecodingParameters.TEXT, repetition_penalty=2.5)
    assert (await generate(services, decoding=plain)).text == TEXT


async def test_generate_stream_refuses_a_missing_request(services: Services) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="missing request") as caught:
        await services.tgis.GenerateStream(pb.SingleGenerationRequest()).read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_find_model_by_header_by_field_and_alone(short_model: ServedModel, llama: ServedModel) -> None:
    async with serve_grpc(ScriptedEngine(lambda asked: [5]), short_model, llama, config=CONFIG) as services:
        await services.tgis.Generate(batch("a"), metadata=(("mm-model-id", "llama"),))
        await services.tgis.Generate(
            pb.BatchedGenerationRequest(model_id="m1", requests=[pb.GenerationRequest(text="a")])
        )
        assert [asked.model_id for asked in services.engine.asked] == ["llama", "m1"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.tgis.Generate(batch("a"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.tgis.Generate(batch("a"), metadata=(("mm-model-id-bin", b"gone"),))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        # Without a header or message before it, gRPC sends the trailer as the answer's only header, by which a proxy sends the call on.
        assert dict(tuple(caught.value.trailing_metadata()))[NOT_HERE_HEADER] == "1"
        assert not tuple(caught.value.initial_metadata())


async def test_generate_engine_errors_have_their_status_and_hint(services: Services) -> None:
    from runtime.errors import Overloaded

    services.engine.raises = Overloaded("full", retry_after_s=0.25)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch("a", "b"))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata() or ())["retry-after-ms"] == "250"


async def test_generate_failure_ends_the_batch(services: Services) -> None:
    services.engine.step_s = 0.01
    services.engine.fail_after = 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch("a", "b"))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "model m1: the engine died")
    assert dict(tuple(caught.value.trailing_metadata()))[NOT_HERE_HEADER] == "1"
