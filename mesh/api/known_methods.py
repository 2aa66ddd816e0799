"""Lists the known methods that take exactly one message: they are forwarded without waiting for the client to half-close."""

from wire.fmaas import generation_pb2
from wire.inference import grpc_predict_v2_pb2

_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)


def single_message_methods() -> frozenset[str]:
    """Return them as `package.Service/Method`."""
    return frozenset(
        f"{service.full_name}/{method.name}"
        for service in _SERVICES
        for method in service.methods
        if not method.client_streaming
    )
