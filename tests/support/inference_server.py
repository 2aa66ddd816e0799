"""A real gRPC server with the inference services over a scripted engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from runtime.api.grpc_request_log import GrpcRequestLog
from runtime.api.grpc_services import INFERENCE_SERVICES, add_inference_services
from runtime.config.schema import RuntimeConfig
from runtime.interfaces import ServedModel
from runtime.observability.metrics import RuntimeMetrics
from tests.support.scripted_engine import Directory, ScriptedEngine
from wire.fmaas import generation_pb2 as pb
from wire.fmaas.generation_pb2_grpc import GenerationServiceStub
from wire.inference.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

TEXT = (
    "The first time I saw the movie, I was a little bit confused 🤖. The dog"  # what the shared server's engine answers
)
CONFIG = RuntimeConfig(max_new_tokens=169)


@dataclass(frozen=True)
class Services:
    tgis: GenerationServiceStub
    oip: GRPCInferenceServiceStub
    engine: ScriptedEngine
    model: ServedModel
    names: tuple[str, ...]

    def script(self, text: str) -> list[int]:
        return self.model.text.encode(text, add_special_tokens=False)


@asynccontextmanager
async def serve_grpc(
    engine: ScriptedEngine, *models: ServedModel, config: RuntimeConfig | None = None
) -> AsyncIterator[Services]:
    server = grpc.aio.server(interceptors=(GrpcRequestLog(*INFERENCE_SERVICES),))
    add_inference_services(server, Directory(list(models)), engine, config or RuntimeConfig(), RuntimeMetrics())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Services(
            GenerationServiceStub(channel), GRPCInferenceServiceStub(channel), engine, models[0], INFERENCE_SERVICES
        )
    await server.stop(0)


def batch(*texts: str, **params: Any) -> pb.BatchedGenerationRequest:
    return pb.BatchedGenerationRequest(
        model_id="unused", requests=[pb.GenerationRequest(text=text) for text in texts], params=pb.Parameters(**params)
    )


def single(text: str = "The fox", **params: Any) -> pb.SingleGenerationRequest:
    return pb.SingleGenerationRequest(
        model_id="unused", request=pb.GenerationRequest(text=text), params=pb.Parameters(**params)
    )


async def generate(services: Services, text: str = "The fox", **params: Any) -> pb.GenerationResponse:
    answer = await services.tgis.Generate(batch(text, **params))
    return answer.responses[0]
