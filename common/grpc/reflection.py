"""Serves gRPC server reflection in both of its versions, v1 and v1alpha.

The library has only v1alpha. The two differ in their package's name alone, so that its servicer answers for both.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import Default, DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha._async import ReflectionServicer

_ALPHA = "grpc.reflection.v1alpha"
_STABLE = "grpc.reflection.v1"
_SERVICE = "ServerReflection"
REFLECTION_SERVICES = (f"{_STABLE}.{_SERVICE}", f"{_ALPHA}.{_SERVICE}")


def reflection_handlers(services: Iterable[str]) -> tuple[grpc.GenericRpcHandler, ...]:
    """Return the handlers of both versions, which list `services` and reflection itself."""
    names = (*services, *REFLECTION_SERVICES)
    servicer = ReflectionServicer(names, pool=_pool(names))
    method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=pb.ServerReflectionRequest.FromString,
        response_serializer=pb.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
        for service in REFLECTION_SERVICES
    )


def _pool(services: Iterable[str]) -> DescriptorPool:
    """Return a pool with the files of the services, which also has those of v1."""
    pool = DescriptorPool()
    added: set[str] = set()
    for service in services:
        if not service.startswith(f"{_STABLE}."):
            for proto in _files(Default().FindFileContainingSymbol(service), added):
                pool.Add(proto)
    pool.Add(_renamed(pb.DESCRIPTOR))
    return pool


def _files(file: Any, added: set[str]) -> Iterator[FileDescriptorProto]:
    """Yield a file's imports and then the file, leaving out what is in `added`."""
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        yield from _files(dependency, added)
    yield _proto(file)


def _proto(file: Any) -> FileDescriptorProto:
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    return proto


def _renamed(file: Any) -> FileDescriptorProto:
    """Return a copy of v1alpha's file with the names of v1."""
    proto = _proto(file)
    proto.name, proto.package = f"{_STABLE.replace('.', '/')}/reflection.proto", _STABLE
    for message in proto.message_type:
        for field in (each for each in message.field if each.type_name):
            field.type_name = field.type_name.replace(f".{_ALPHA}.", f".{_STABLE}.")
    for method in proto.service[0].method:
        method.input_type = method.input_type.replace(f".{_ALPHA}.", f".{_STABLE}.")
        method.output_type = method.output_type.replace(f".{_ALPHA}.", f".{_STABLE}.")
    return proto
