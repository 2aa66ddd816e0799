"""Adds the gRPC inference services to a server."""

import grpc.aio

from runtime.api.oip.service import InferenceService
from runtime.api.tgis.service import GenerationService
from runtime.config.schema import RuntimeConfig
from runtime.generation.generator import Generator
from runtime.interfaces import ModelDirectory, TokenEngine
from runtime.observability.metrics import RuntimeMetrics
from wire.fmaas import generation_pb2, generation_pb2_grpc
from wire.inference import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc

INFERENCE_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
"""Their full names, for reflection, health checks and the log."""


def add_inference_services(
    server: grpc.aio.Server,
    directory: ModelDirectory,
    engine: TokenEngine,
    config: RuntimeConfig,
    metrics: RuntimeMetrics,
    *,
    generator: Generator | None = None,
) -> None:
    """Add TGIS and the Open Inference Protocol.

    Pass the HTTP app's `generator`, so that a model's concurrency limit counts the sequences of both.
    """
    generator = generator or Generator(engine, metrics)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(directory, generator, config), server)
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(directory, generator), server)
