"""inference.GRPCInferenceService through its stubs."""

import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from common.model_key import ModelSettings
from runtime.errors import Overloaded
from runtime.interfaces import ServedModel
from tests.support.inference_server import Services, serve_grpc
from tests.support.scripted_engine import ScriptedEngine, served
from wire.inference import grpc_predict_v2_pb2 as pb

TEXT = "The dog sleeps. END"


@pytest.fixture
async def services(model: ServedModel) -> AsyncIterator[Services]:
    tokens = model.text.encode(TEXT, add_special_tokens=False)
    async with serve_grpc(ScriptedEngine(lambda asked: [*tokens, 0]), model) as found:
        yield found


def infer(
    *texts: str, raw: bool = False, shape: list[int] | None = None, **parameters: pb.InferParameter
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m1", id="7", parameters=parameters)
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=shape or [len(texts)])
    if raw:
        request.raw_input_contents.append(
            b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
        )
    else:
        tensor.contents.bytes_contents.extend(text.encode() for text in texts)
    return request


@pytest.mark.parametrize("raw", [False, True])
async def test_model_infer_returns_texts(services: Services, raw: bool) -> None:
    request = infer(
        "The fox", "Grüße", raw=raw, shape=[2, 1],
        temperature=pb.InferParameter(double_param=0.5), max_tokens=pb.InferParameter(int64_param=50),
        stop=pb.InferParameter(string_param='["END", "x"]'), seed=pb.InferParameter(uint64_param=9),
    )  # fmt: skip
    answer = await services.oip.ModelInfer(request)
    assert (answer.model_name, answer.model_version, answer.id) == ("m1", "1", "7")
    [tensor] = answer.outputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("text_output", "BYTES", [2])
    wanted = TEXT.removesuffix("END").encode()
    if raw:
        assert answer.raw_output_contents[0] == (struct.pack("<I", len(wanted)) + wanted) * 2
        assert not tensor.contents.bytes_contents
    else:
        assert list(tensor.contents.bytes_contents) == [wanted, wanted]
    prompts = [services.model.text.decode(asked.request.prompt) for asked in services.engine.asked]
    assert sorted(prompts) == ["Grüße", "The fox"]
    sampling = services.engine.asked[0].request.sampling
    assert (sampling.temperature, sampling.seed, services.engine.asked[0].request.stop.max_tokens) == (0.5, 9, 50)


def broken(name: str) -> pb.ModelInferRequest:
    request = infer("a")
    match name:
        case "tensor":
            request.inputs[0].name = "other"
        case "datatype":
            request.inputs[0].datatype = "FP32"
        case "shape":
            request.inputs[0].shape[:] = [1, 2]
        case "elements":
            request.inputs[0].shape[:] = [2]
        case "both":
            request.raw_input_contents.append(b"\1\0\0\0a")
        case "short":
            request = infer("a", raw=True)
            request.raw_input_contents[0] = b"\5\0\0\0a"
        case "utf8":
            request.inputs[0].contents.bytes_contents[0] = b"\xff"
        case "output":
            request.outputs.add(name="other")
        case "parameter":
            request.parameters["top_z"].int64_param = 1
        case "type":
            request.parameters["max_tokens"].string_param = "many"
        case "range":
            request.parameters["top_p"].double_param = 7
        case "length":
            request.parameters["max_tokens"].int64_param = 4000
    return request


@pytest.mark.parametrize(
    "name",
    [
        "tensor",
        "datatype",
        "shape",
        "elements",
        "both",
        "short",
        "utf8",
        "output",
        "parameter",
        "type",
        "range",
        "length",
    ],
)
async def test_model_infer_refuses_bad_input(services: Services, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.oip.ModelInfer(broken(name))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not services.engine.asked


async def test_model_infer_without_prompts(services: Services) -> None:
    answer = await services.oip.ModelInfer(infer(shape=[0]))
    assert list(answer.outputs[0].shape) == [0]


async def test_server_live_ready_and_metadata(services: Services) -> None:
    assert (await services.oip.ServerLive(pb.ServerLiveRequest())).live
    assert (await services.oip.ServerReady(pb.ServerReadyRequest())).ready
    assert (await services.oip.ModelReady(pb.ModelReadyRequest(name="m1"))).ready
    assert not (await services.oip.ModelReady(pb.ModelReadyRequest(name="nobody"))).ready
    assert not (await services.oip.ModelReady(pb.ModelReadyRequest(name="m1", version="2"))).ready
    assert (await services.oip.ServerMetadata(pb.ServerMetadataRequest())).name == "repertory"
    found = await services.oip.ModelMetadata(pb.ModelMetadataRequest(name="alias"), metadata=(("mm-model-id", "m1"),))
    assert (found.name, found.inputs[0].name, found.outputs[0].name) == ("alias", "text_input", "text_output")
    assert found.properties["max_model_len"] == "200"


@pytest.mark.parametrize(
    ("name", "version", "code"), [("m1", "3", grpc.StatusCode.INVALID_ARGUMENT), ("no", "", grpc.StatusCode.NOT_FOUND)]
)
async def test_model_infer_refuses_unknown_models_and_versions(
    services: Services, name: str, version: str, code: grpc.StatusCode
) -> None:
    """NOT_FOUND has a mesh load the model again: a version that is not there must not."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.oip.ModelMetadata(pb.ModelMetadataRequest(name=name, version=version))
    assert caught.value.code() == code


async def test_model_infer_shows_the_name_instead_of_the_meshs_id(model_dir: Path) -> None:
    named = served(model_dir, "smol__b56d243b86", settings=ModelSettings(display_name="smol"))
    async with serve_grpc(ScriptedEngine(lambda asked: [5]), named) as services:
        request = infer("a")
        request.model_name = named.model_id
        assert (await services.oip.ModelInfer(request)).model_name == "smol"
        assert (await services.oip.ModelMetadata(pb.ModelMetadataRequest(name=named.model_id))).name == "smol"
        services.engine.raises = Overloaded("4096 requests wait already, the limit is 4096", model=named.model_id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.oip.ModelInfer(request)
        assert caught.value.details() == "model smol: 4096 requests wait already, the limit is 4096"


async def test_add_inference_services_returns_the_names(services: Services) -> None:
    assert services.names == ("fmaas.GenerationService", "inference.GRPCInferenceService")
