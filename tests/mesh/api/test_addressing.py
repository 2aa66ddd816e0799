"""How a gRPC call names its model: headers, binary headers, fields of the message, vmodels, and what is refused."""

from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.support.fake_runtime import Switches
from tests.support.pods import RunningPod, code_of, running_pod
from wire.fmaas import generation_pb2 as fmaas
from wire.inference import grpc_predict_v2_pb2 as oip
from wire.inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

FOR_M = (("mm-model-id", "m"),)


@pytest.mark.parametrize(
    ("metadata", "code", "text"),
    [
        ((), "INVALID_ARGUMENT", "must include mm-model-id header"),
        ((("mm-model-id", ""),), "INVALID_ARGUMENT", "provided model-id header must be non-empty"),
        (
            (("mm-model-id", "m"), ("mm-vmodel-id", "v")),
            "INVALID_ARGUMENT",
            "must include only one of model id and vmodel id",
        ),
        ((("mm-model-id", "nope"),), "NOT_FOUND", "model not found: 'nope'; served here: m"),
        ((("mm-vmodel-id", "m"),), "NOT_FOUND", "vmodel not found"),
        ((("mm-model-id", "n"), ("mm-model-id", "o")), "NOT_FOUND", "none of the requested models were found"),
    ],
)
async def test_addressing_refuses_wrong_addresses(
    pod: RunningPod, metadata: tuple[tuple[str, str], ...], code: str, text: str
) -> None:
    got, details = await code_of(pod.unary("/test.Any/Echo")(b"hi", metadata=metadata))
    assert got is grpc.StatusCode[code]
    assert text in details


async def test_addressing_binary_header_names_a_non_ascii_model(pod: RunningPod) -> None:
    await pod.register("modèle")
    call = pod.unary("/test.Any/Echo")
    code, _ = await code_of(call(b"hi", metadata=(("mm-model-id-bin", "modèle".encode()),)))
    # the fake knows models by the plain header only, which such an id cannot have
    assert code is grpc.StatusCode.NOT_FOUND
    assert dict(pod.runtime.metadata[-1])["mm-model-id-bin"] == "modèle".encode()
    assert "mm-model-id" not in dict(pod.runtime.metadata[-1])


async def test_inference_resolves_a_vmodel(either: RunningPod) -> None:
    model = await either.name("smol", "/files")
    await either.unary("/test.Any/Echo")(b"hi", metadata=(("mm-vmodel-id", "smol"),))
    assert dict(either.runtime.metadata[-1])["mm-model-id"] == model["model_id"]
    assert await either.echo("smol", b"by plain name") == b"by plain name"


async def test_addressing_reads_the_model_from_messages(pod: RunningPod) -> None:
    request = fmaas.BatchedGenerationRequest(model_id="m").SerializeToString()
    assert await pod.unary("/fmaas.GenerationService/Generate")(request) == request
    infer = oip.ModelInferRequest(model_name="m").SerializeToString()
    assert await pod.unary("/inference.GRPCInferenceService/ModelInfer")(infer) == infer
    other = fmaas.BatchedGenerationRequest(model_id="nope").SerializeToString()
    code, _ = await code_of(pod.unary("/fmaas.GenerationService/Generate")(other))
    assert code is grpc.StatusCode.NOT_FOUND
    # a header wins over what the message says, unless a configuration says otherwise
    assert await pod.unary("/fmaas.GenerationService/Generate")(other, metadata=FOR_M) == other


async def test_addressing_applies_the_dataplane_configuration(tmp_path: Path) -> None:
    config = '{"rpcConfigs": {"test.Any/Echo": {"idExtractionPath": [1], "vModelId": true}}, "allowOtherRpcs": false}'
    async with running_pod(tmp_path / "pod", dataplane_config=config) as pod:
        await pod.name("smol", "/files")
        message = fmaas.BatchedGenerationRequest(model_id="smol").SerializeToString()
        assert await pod.unary("/test.Any/Echo")(message, metadata=(("mm-model-id", "other"),)) == message
        code, _ = await code_of(pod.unary("/test.Any/Count")(b"1", metadata=(("mm-vmodel-id", "smol"),)))
        assert code is grpc.StatusCode.UNIMPLEMENTED
        code, _ = await code_of(GRPCInferenceServiceStub(pod.channel).ModelReady(oip.ModelReadyRequest(name="smol")))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_inference_injects_the_concrete_id(tmp_path: Path) -> None:
    switches = Switches(methods={"fmaas.GenerationService/Generate": (1,)})
    async with running_pod(tmp_path / "pod", switches=switches) as pod:
        model = await pod.name("smol", "/files")
        request = fmaas.BatchedGenerationRequest(model_id="smol", requests=[fmaas.GenerationRequest(text="hi")])
        answer = await pod.unary("/fmaas.GenerationService/Generate")(request.SerializeToString())
        seen = fmaas.BatchedGenerationRequest.FromString(answer)
        assert (seen.model_id, seen.requests[0].text) == (model["model_id"], "hi")


async def test_addressing_refuses_the_runtimes_management(pod: RunningPod) -> None:
    code, details = await code_of(pod.unary("/mmesh.ModelRuntime/unloadModel")(b"", metadata=FOR_M))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "not permitted" in details


@pytest.mark.parametrize(
    "method",
    [
        "repertory.RuntimeState/fit",
        "repertory.RuntimeState/watch",
        "mmesh.ModelRuntime/unloadModel",
        "com.ibm.watson.tas.internal.proto.ModelServer/unloadModel",
    ],
)
async def test_inference_does_not_forward_the_runtimes_own_methods(pod: RunningPod, method: str) -> None:
    await pod.echo("m")
    log = list(pod.runtime.log)
    assert (await code_of(pod.unary(f"/{method}")(b"", metadata=FOR_M)))[0] is grpc.StatusCode.UNIMPLEMENTED
    assert pod.runtime.log == log
    assert not pod.runtime.fits
