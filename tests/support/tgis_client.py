"""A blocking client of the TGIS API; the generated stubs are typed for asyncio channels only."""

import grpc

from wire.fmaas.generation_pb2 import BatchedGenerationRequest, BatchedGenerationResponse


def generate(
    channel: grpc.Channel,
    request: BatchedGenerationRequest,
    metadata: tuple[tuple[str, str], ...],
    timeout_s: float = 60,
) -> BatchedGenerationResponse:
    """Call `fmaas.GenerationService/Generate`. Raises grpc.RpcError."""
    call: grpc.UnaryUnaryMultiCallable[BatchedGenerationRequest, BatchedGenerationResponse] = channel.unary_unary(
        "/fmaas.GenerationService/Generate",
        request_serializer=BatchedGenerationRequest.SerializeToString,
        response_deserializer=BatchedGenerationResponse.FromString,
    )
    return call(request, metadata=metadata, timeout=timeout_s)
