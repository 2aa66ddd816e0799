"""The contracts on the wire: method names, field numbers and enum values as other implementations have them."""

from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from wire import etcd_pb2
from wire.fmaas import generation_pb2, generation_pb2_grpc
from wire.inference import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc
from wire.mmesh import model_mesh_pb2, model_mesh_pb2_grpc, model_runtime_pb2, model_runtime_pb2_grpc
from wire.repertory import runtime_pb2, runtime_pb2_grpc

SERVICES = {
    "mmesh.ModelRuntime": (model_runtime_pb2, "loadModel unloadModel predictModelSize modelSize runtimeStatus"),
    "mmesh.ModelMesh": (
        model_mesh_pb2,
        "registerModel unregisterModel getModelStatus ensureLoaded setVModel deleteVModel getVModelStatus",
    ),
    "fmaas.GenerationService": (generation_pb2, "Generate GenerateStream Tokenize ModelInfo"),
    "inference.GRPCInferenceService": (
        grpc_predict_v2_pb2,
        "ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelInfer",
    ),
    "repertory.RuntimeState": (runtime_pb2, "watch fit listFiles dropFiles"),
}
STREAMS = {"fmaas.GenerationService/GenerateStream", "repertory.RuntimeState/watch"}

# Each message's fields in the order of their numbers; "-" stands for a number that is not used.
FIELDS = {
    model_runtime_pb2.LoadModelRequest: "modelId modelType modelPath modelKey",
    model_runtime_pb2.LoadModelResponse: "sizeInBytes maxConcurrency",
    model_runtime_pb2.UnloadModelRequest: "modelId",
    model_runtime_pb2.UnloadModelResponse: "",
    model_runtime_pb2.PredictModelSizeRequest: "modelId modelType modelPath modelKey",
    model_runtime_pb2.PredictModelSizeResponse: "sizeInBytes",
    model_runtime_pb2.ModelSizeRequest: "modelId",
    model_runtime_pb2.ModelSizeResponse: "sizeInBytes",
    model_runtime_pb2.RuntimeStatusRequest: "",
    model_runtime_pb2.RuntimeStatusResponse: (
        "status capacityInBytes maxLoadingConcurrency modelLoadingTimeoutMs defaultModelSizeInBytes "
        "runtimeVersion numericRuntimeVersion methodInfos limitModelConcurrency allowAnyMethod"
    ),
    model_runtime_pb2.RuntimeStatusResponse.MethodInfo: "idInjectionPath",
    model_mesh_pb2.RegisterModelRequest: "modelId modelInfo loadNow sync lastUsedTime",
    model_mesh_pb2.ModelInfo: "type path key",
    model_mesh_pb2.ModelStatusInfo: "status errors modelCopyInfos",
    model_mesh_pb2.ModelStatusInfo.ModelCopyInfo: "location copyStatus time",
    model_mesh_pb2.UnregisterModelRequest: "modelId",
    model_mesh_pb2.GetStatusRequest: "modelId",
    model_mesh_pb2.EnsureLoadedRequest: "modelId lastUsedTime - sync",
    model_mesh_pb2.VModelStatusInfo: "status activeModelId targetModelId activeModelStatus targetModelStatus owner",
    model_mesh_pb2.SetVModelRequest: (
        "vModelId targetModelId updateOnly modelInfo autoDeleteTargetModel loadNow force sync expectedTargetModelId owner"
    ),
    model_mesh_pb2.DeleteVModelRequest: "vModelId owner",
    model_mesh_pb2.GetVModelStatusRequest: "vModelId owner",
    generation_pb2.BatchedGenerationRequest: "model_id prefix_id requests adapter_id - - - - - params",
    generation_pb2.SingleGenerationRequest: "model_id prefix_id request adapter_id - - - - - params",
    generation_pb2.BatchedGenerationResponse: "responses",
    generation_pb2.GenerationRequest: "- text",
    generation_pb2.GenerationResponse: (
        "- generated_token_count - text - input_token_count stop_reason tokens input_tokens seed stop_sequence"
    ),
    generation_pb2.Parameters: "method sampling stopping response decoding truncate_input_tokens",
    generation_pb2.DecodingParameters: "repetition_penalty length_penalty format json_schema regex choice grammar",
    generation_pb2.DecodingParameters.LengthPenalty: "start_index decay_factor",
    generation_pb2.DecodingParameters.StringChoices: "choices",
    generation_pb2.SamplingParameters: "temperature top_k top_p typical_p seed",
    generation_pb2.StoppingCriteria: "max_new_tokens min_new_tokens time_limit_millis stop_sequences include_stop_sequence",
    generation_pb2.ResponseOptions: "input_text generated_tokens input_tokens token_logprobs token_ranks top_n_tokens",
    generation_pb2.TokenInfo: "- text logprob rank top_tokens",
    generation_pb2.TokenInfo.TopToken: "- text logprob",
    generation_pb2.BatchedTokenizeRequest: "model_id requests return_tokens return_offsets truncate_input_tokens prefix_id adapter_id",
    generation_pb2.BatchedTokenizeResponse: "responses",
    generation_pb2.TokenizeRequest: "text",
    generation_pb2.TokenizeResponse: "token_count tokens offsets",
    generation_pb2.TokenizeResponse.Offset: "start end",
    generation_pb2.ModelInfoRequest: "model_id",
    generation_pb2.ModelInfoResponse: "model_kind max_sequence_length max_new_tokens",
    grpc_predict_v2_pb2.ModelReadyRequest: "name version",
    grpc_predict_v2_pb2.ServerMetadataResponse: "name version extensions",
    grpc_predict_v2_pb2.ModelMetadataRequest: "name version",
    grpc_predict_v2_pb2.ModelMetadataResponse: "name versions platform inputs outputs properties",
    grpc_predict_v2_pb2.ModelMetadataResponse.TensorMetadata: "name datatype shape",
    grpc_predict_v2_pb2.ModelInferRequest: "model_name model_version id parameters inputs outputs raw_input_contents",
    grpc_predict_v2_pb2.ModelInferRequest.InferInputTensor: "name datatype shape parameters contents",
    grpc_predict_v2_pb2.ModelInferRequest.InferRequestedOutputTensor: "name parameters",
    grpc_predict_v2_pb2.ModelInferResponse: "model_name model_version id parameters outputs raw_output_contents",
    grpc_predict_v2_pb2.ModelInferResponse.InferOutputTensor: "name datatype shape parameters contents",
    grpc_predict_v2_pb2.InferParameter: "bool_param int64_param string_param double_param uint64_param",
    grpc_predict_v2_pb2.InferTensorContents: (
        "bool_contents int_contents int64_contents uint_contents uint64_contents fp32_contents fp64_contents bytes_contents"
    ),
    etcd_pb2.KeyValue: "key create_revision mod_revision version value lease",
    etcd_pb2.WatchResponse: "header watch_id created canceled compact_revision cancel_reason fragment - - - events",
    etcd_pb2.TxnResponse: "header succeeded responses",
}

ENUMS = {
    model_runtime_pb2.RuntimeStatusResponse.Status: {"STARTING": 0, "READY": 1, "FAILING": 2},
    model_mesh_pb2.ModelStatusInfo.ModelStatus: {
        "NOT_FOUND": 0,
        "NOT_LOADED": 1,
        "LOADING": 2,
        "LOADED": 3,
        "LOADING_FAILED": 4,
        "UNKNOWN": 5,
    },
    model_mesh_pb2.VModelStatusInfo.VModelStatus: {
        "NOT_FOUND": 0,
        "DEFINED": 1,
        "TRANSITIONING": 2,
        "TRANSITION_FAILED": 3,
        "UNKNOWN": 5,
    },
    generation_pb2.DecodingMethod: {"GREEDY": 0, "SAMPLE": 1},
    generation_pb2.StopReason: {
        "NOT_FINISHED": 0,
        "MAX_TOKENS": 1,
        "EOS_TOKEN": 2,
        "CANCELLED": 3,
        "TIME_LIMIT": 4,
        "STOP_SEQUENCE": 5,
        "TOKEN_LIMIT": 6,
        "ERROR": 7,
    },
    generation_pb2.DecodingParameters.ResponseFormat: {"TEXT": 0, "JSON": 1},
    generation_pb2.ModelInfoResponse.ModelKind: {"DECODER_ONLY": 0, "ENCODER_DECODER": 1},
}


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_exactly_the_contracts_methods(name: str) -> None:
    module, methods = SERVICES[name]
    service = module.DESCRIPTOR.services_by_name[name.rpartition(".")[2]]
    assert service.full_name == name
    assert [method.name for method in service.methods] == methods.split()
    streams = {f"{name}/{method.name}" for method in service.methods if method.server_streaming}
    assert streams == {path for path in STREAMS if path.startswith(name)}
    assert not any(method.client_streaming for method in service.methods)


@pytest.mark.parametrize("message", FIELDS, ids=lambda message: message.DESCRIPTOR.full_name)
def test_field_numbers(message: type[Message]) -> None:
    fields = message.DESCRIPTOR.fields
    expected = {name: number for number, name in enumerate(FIELDS[message].split(), start=1) if name != "-"}
    assert {field.name: field.number for field in fields} == expected


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.DESCRIPTOR.full_name)
def test_enum_values(enum: EnumTypeWrapper) -> None:
    assert dict(enum.items()) == ENUMS[enum]


def test_wire_fields_carry_presence() -> None:
    """A zero that was sent and a field that was not must not look alike where the two mean different things."""
    assert generation_pb2.SamplingParameters(temperature=0.0).HasField("temperature")
    assert generation_pb2.SamplingParameters(seed=0).HasField("seed")
    assert generation_pb2.StoppingCriteria(include_stop_sequence=False).HasField("include_stop_sequence")
    assert generation_pb2.DecodingParameters(format="TEXT").WhichOneof("guided") == "format"
    assert not generation_pb2.BatchedGenerationRequest().HasField("adapter_id")
    assert not generation_pb2.BatchedGenerationRequest().HasField("prefix_id")


def test_bytes_on_the_wire() -> None:
    """Types as well as numbers: written by hand, one byte after the other."""
    load = model_runtime_pb2.LoadModelRequest(modelId="m", modelKey="{}")
    assert load.SerializeToString() == b"\x0a\x01m\x22\x02{}"
    status = model_runtime_pb2.RuntimeStatusResponse(status="READY", capacityInBytes=300, allowAnyMethod=True)
    assert status.SerializeToString() == b"\x08\x01\x10\xac\x02\x50\x01"
    request = generation_pb2.SingleGenerationRequest(request={"text": "a"}, params={"stopping": {"max_new_tokens": 5}})
    assert request.SerializeToString() == b"\x1a\x03\x12\x01a\x52\x04\x1a\x02\x08\x05"
    compare = etcd_pb2.Compare(target="MOD", key=b"k", mod_revision=0, range_end=b"l")
    assert compare.SerializeToString() == b"\x10\x02\x1a\x01k\x30\x00\x82\x04\x01l"


def test_names_do_not_meet_another_etcd_client() -> None:
    """Any other client may hold `etcdserverpb` and `mvccpb` in this process's one pool."""
    assert etcd_pb2.DESCRIPTOR.package == "repertory.etcd"
    assert not etcd_pb2.DESCRIPTOR.services_by_name
    assert etcd_pb2.DESCRIPTOR.name == "wire/etcd.proto"


async def test_stubs_call_servicers() -> None:
    """Unary and streaming, through a real server, as the runtime and the mesh use them."""

    class State(runtime_pb2_grpc.RuntimeStateServicer):
        async def watch(
            self, request: runtime_pb2.WatchRequest, context: object
        ) -> AsyncIterator[runtime_pb2.RuntimeSnapshot]:
            for used in (1, 2):
                yield runtime_pb2.RuntimeSnapshot(
                    device_used_bytes=used, models=[{"model_id": "m", "state": "LOADED", "tier": "HOST"}]
                )

        async def fit(self, request: runtime_pb2.FitRequest, context: object) -> runtime_pb2.FitResponse:
            return runtime_pb2.FitResponse(fits=True, evicts=[request.model_id])

    server = grpc.aio.server()
    runtime_pb2_grpc.add_RuntimeStateServicer_to_server(State(), server)
    model_runtime_pb2_grpc.add_ModelRuntimeServicer_to_server(model_runtime_pb2_grpc.ModelRuntimeServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            state = runtime_pb2_grpc.RuntimeStateStub(channel)
            snapshots = [snapshot async for snapshot in state.watch(runtime_pb2.WatchRequest())]
            assert [snapshot.device_used_bytes for snapshot in snapshots] == [1, 2]
            assert snapshots[0].models[0].tier == runtime_pb2.ModelState.HOST
            assert list((await state.fit(runtime_pb2.FitRequest(model_id="m"))).evicts) == ["m"]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await model_runtime_pb2_grpc.ModelRuntimeStub(channel).loadModel(model_runtime_pb2.LoadModelRequest())
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(None)


async def test_wire_has_a_stub_of_every_service() -> None:
    stubs: list[Callable[[grpc.aio.Channel], object]] = [
        model_runtime_pb2_grpc.ModelRuntimeStub,
        model_mesh_pb2_grpc.ModelMeshStub,
        generation_pb2_grpc.GenerationServiceStub,
        grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub,
        runtime_pb2_grpc.RuntimeStateStub,
    ]
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        for stub, (_, methods) in zip(stubs, SERVICES.values(), strict=True):
            assert set(methods.split()) <= set(vars(stub(channel)))
