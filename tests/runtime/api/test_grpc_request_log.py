"""The runtime's line per inference call over gRPC: tokens, waiting, times and the outcome, and the mark for a mesh."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from runtime.errors import Overloaded
from tests.support import tokenizers as tiny
from tests.support.inference_server import Services, serve_grpc
from tests.support.scripted_engine import ScriptedEngine, served
from tests.support.waiting import until
from wire.fmaas import generation_pb2 as pb
from wire.inference import grpc_predict_v2_pb2 as oip

TEXT = "The dog sleeps."
PROMPT = "The quick brown fox"
LOGGER = "runtime.api.request_log"


@pytest.fixture
async def services(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Services]:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = served(tiny.byte_level(tmp_path), "m1")
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve_grpc(ScriptedEngine(lambda asked: [*tokens, 0]), model) as found:
        yield found


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.name == LOGGER]


async def written(caplog: pytest.LogCaptureFixture, count: int = 1) -> list[dict[str, Any]]:
    """Wait for so many lines, and return all. A line is written after the client has its answer."""
    await until(lambda: len(lines(caplog)) >= count)
    return lines(caplog)


def batch(*texts: str, max_new_tokens: int = 3) -> pb.BatchedGenerationRequest:
    params = pb.Parameters(stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens))
    return pb.BatchedGenerationRequest(requests=[pb.GenerationRequest(text=text) for text in texts], params=params)


def single(**params: Any) -> pb.SingleGenerationRequest:
    return pb.SingleGenerationRequest(request=pb.GenerationRequest(text=PROMPT), params=pb.Parameters(**params))


def infer() -> oip.ModelInferRequest:
    tensor = oip.ModelInferRequest.InferInputTensor(
        name="text_input", datatype="BYTES", shape=[1], contents=oip.InferTensorContents(bytes_contents=[b"hi"])
    )
    max_tokens = {"max_tokens": oip.InferParameter(int64_param=3)}
    return oip.ModelInferRequest(model_name="m1", inputs=[tensor], parameters=max_tokens)


async def test_grpc_log_counts_tokens_of_a_batch(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    await services.tgis.Generate(batch(PROMPT, PROMPT))
    (line,) = await written(caplog)
    assert (line["code"], line["method"], line["path"]) == ("OK", "gRPC", "/fmaas.GenerationService/Generate")
    assert (line["model"], line["output_tokens"]) == ("m1", 6)
    assert line["prompt_tokens"] == 2 * len(services.model.text.encode(PROMPT, add_special_tokens=True))
    assert 0 < line["first_s"] <= line["total_s"] + 0.001
    assert line["levelno"] == logging.INFO


async def test_grpc_log_counts_tokens_of_a_stream(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    async for _ in services.tgis.GenerateStream(single(stopping=pb.StoppingCriteria(max_new_tokens=3))):
        pass
    (line,) = await written(caplog)
    assert (line["code"], line["model"], line["output_tokens"]) == ("OK", "m1", 3)


async def test_grpc_log_counts_tokens_of_the_open_inference_protocol(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    await services.oip.ModelInfer(infer())
    (line,) = await written(caplog)
    assert (line["code"], line["path"]) == ("OK", "/inference.GRPCInferenceService/ModelInfer")
    assert (line["model"], line["output_tokens"]) == ("m1", 3)


async def test_grpc_log_has_the_name_and_the_wait_of_a_mesh(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    sent = (
        ("x-repertory-name", "caf%C3%A9"),
        ("x-repertory-caller", "team"),
        ("x-repertory-waited", "12.5"),
        ("x-request-id", "mine"),
    )
    call = services.tgis.Generate(batch(PROMPT), metadata=sent)
    await call
    (line,) = await written(caplog)
    assert (line["asked"], line["key"], line["wait_s"], line["request_id"]) == ("café", "team", 12.5, "mine")
    assert line["total_s"] > 12.5
    assert ("x-repertory-logged", "1") in tuple(await call.trailing_metadata())


async def test_grpc_log_of_a_call_without_a_mesh_leaves_no_mark(services: Services) -> None:
    call = services.tgis.Generate(batch(PROMPT))
    await call
    assert tuple(await call.trailing_metadata()) == ()


async def test_grpc_log_of_a_refusal_has_its_status(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    """The mark for the mesh and the retry hint are both in the trailers."""
    services.engine.raises = Overloaded("full", retry_after_s=2.0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.tgis.Generate(batch(PROMPT), metadata=(("x-repertory-name", "m"),))
    assert (await written(caplog))[0]["code"] == "RESOURCE_EXHAUSTED"
    trailers = dict(caught.value.trailing_metadata() or ())
    assert (trailers["x-repertory-logged"], trailers["retry-after-ms"]) == ("1", "2000")


async def test_grpc_log_of_a_failed_stream_has_its_status(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = served(tiny.byte_level(tmp_path), "m1")
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve_grpc(ScriptedEngine(lambda asked: tokens, fail_after=2), model) as services:
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in services.tgis.GenerateStream(single()):
                pass
    (line,) = await written(caplog)
    assert (line["code"], line["output_tokens"]) == ("UNAVAILABLE", 2)


async def test_grpc_log_of_a_cancelled_call_is_cancelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = served(tiny.byte_level(tmp_path), "m1")
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve_grpc(ScriptedEngine(lambda asked: tokens * 100, step_s=0.01), model) as services:
        call = services.tgis.Generate(batch(PROMPT, max_new_tokens=100))
        waiting = asyncio.ensure_future(call)
        await until(lambda: bool(services.engine.asked) and services.engine.asked[0].sent > 0)
        call.cancel()
        await until(lambda: bool(lines(caplog)))
        assert waiting.done()
    assert lines(caplog)[0]["code"] == "CANCELLED"


async def test_grpc_log_of_polls_is_at_debug(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    await services.oip.ModelReady(oip.ModelReadyRequest(name="m1"))
    await services.tgis.ModelInfo(pb.ModelInfoRequest())
    assert [line["levelno"] for line in await written(caplog, 2)] == [logging.DEBUG, logging.DEBUG]
