# Generated from proto/repertory/runtime.proto by scripts/proto.py. Do not edit.
from collections.abc import AsyncIterator, Awaitable
import grpc.aio
from wire.repertory import runtime_pb2 as pb

class RuntimeStateStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    watch: grpc.aio.UnaryStreamMultiCallable[pb.WatchRequest, pb.RuntimeSnapshot]
    fit: grpc.aio.UnaryUnaryMultiCallable[pb.FitRequest, pb.FitResponse]

class RuntimeStateServicer:
    def watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[pb.WatchRequest, pb.RuntimeSnapshot]) -> AsyncIterator[pb.RuntimeSnapshot]: ...
    def fit(self, request: pb.FitRequest, context: grpc.aio.ServicerContext[pb.FitRequest, pb.FitResponse]) -> Awaitable[pb.FitResponse]: ...

def add_RuntimeStateServicer_to_server(servicer: RuntimeStateServicer, server: grpc.aio.Server) -> None: ...
