"""Lists the methods whose numbers of messages are known, because forwarding them costs less."""

from collections.abc import Callable

from google.protobuf.descriptor import MethodDescriptor

from wire.fmaas import generation_pb2
from wire.inference import grpc_predict_v2_pb2

_SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)


def single_message_methods() -> frozenset[str]:
    """Return, as `package.Service/Method`, the methods that take exactly one message: they need no half-close of the client."""
    return _methods(lambda method: not method.client_streaming)


def unary_methods() -> frozenset[str]:
    """Return those of `single_message_methods` that also answer with exactly one message."""
    return _methods(lambda method: not method.client_streaming and not method.server_streaming)


def _methods(is_meant: Callable[[MethodDescriptor], bool]) -> frozenset[str]:
    return frozenset(
        f"{service.full_name}/{method.name}" for service in _SERVICES for method in service.methods if is_meant(method)
    )
