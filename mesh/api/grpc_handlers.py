"""Finds the handler of each gRPC call after admitting the call, before any of its messages is read.

It replaces interceptors, each of which costs a coroutine per call.
"""

from __future__ import annotations  # grpc's handler types take parameters only for the type checker

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
import grpc.aio

from common.log_headers import CALLER_HEADER
from mesh.access.caller import ANYBODY, PEER, set_caller
from mesh.access.guard import Guard, bearer_secret
from mesh.access.peer_keys import PEER_KEY_HEADER
from mesh.access.scopes import grpc_scopes
from mesh.api.addressing import as_called
from mesh.api.call_metadata import CallMetadata
from mesh.api.grpc_calls import GrpcCalls
from mesh.api.grpc_own_calls import own_call
from mesh.errors import MeshError

_MANAGEMENT = ("/mmesh.ModelMesh/", "/com.ibm.watson.tas.proto.TasRuntime/")


class Admission(Protocol):
    """Admits a call and sets the caller of the current task, or raises MeshError. Returns a function to call at the end of the call, or None."""

    def __call__(self, method: str, metadata: CallMetadata) -> Callable[[], None] | None: ...


def admit_by(guard: Guard, *, behind_envoy: bool = False) -> Admission:
    """Return the admission of a listener for callers. `behind_envoy`: only Envoy connects, which recognises some callers itself."""

    def admit(method: str, metadata: CallMetadata) -> Callable[[], None] | None:
        if behind_envoy and CALLER_HEADER in metadata:
            guard.admit_recognised(unquote(metadata.first(CALLER_HEADER)))
            return None
        if not guard.requires_keys and PEER_KEY_HEADER not in metadata:
            set_caller(ANYBODY)
            return None
        secret = bearer_secret(metadata.first("authorization"))
        return guard.admit((secret,), metadata.first(PEER_KEY_HEADER), grpc_scopes(method))

    return admit


def admit_peers(method: str, metadata: CallMetadata) -> None:
    """Admit all calls of a listener that only pods with a certificate reach."""
    set_caller(PEER)


class OwnHandlers:
    """Collects the handlers of the pod's own services from the generated functions that add them to a server.

    They are not registered with gRPC: a server waits for each registered method with a task of its own, which every call of any method pays for.
    """

    def __init__(self) -> None:
        self.generic: list[grpc.GenericRpcHandler] = []

    def add(self, servicer: object, add_to_server: Callable[..., None]) -> None:
        """Add a service. `add_to_server`: the generated function for it."""
        add_to_server(servicer, self)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self.generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Do nothing: the same methods are in a generic handler."""


class GrpcHandlers(grpc.GenericRpcHandler):
    """The only handler of a server. A method that no handler in `own` takes is forwarded. `behind_envoy`: only Envoy connects."""

    def __init__(
        self,
        admit: Admission,
        own: Sequence[grpc.GenericRpcHandler],
        calls: GrpcCalls,
        *,
        behind_envoy: bool = False,
    ) -> None:
        self._behind_envoy = behind_envoy
        self._admit = admit
        self._own = tuple(own)
        self._calls = calls
        self._not_own: set[str] = set()  # known methods that no handler in `own` takes

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        path = str(handler_call_details.method)
        sent = tuple(handler_call_details.invocation_metadata or ())
        metadata = CallMetadata(as_called(sent) if self._behind_envoy else sent)
        try:
            end = self._admit(path, metadata)
        except MeshError as error:
            return grpc.stream_stream_rpc_method_handler(self._calls.refusal(error, path.lstrip("/"), metadata))
        # A call's handler runs in the task that looks for it, which ends with the call.
        if end is not None and (call := asyncio.current_task()) is not None:
            call.add_done_callback(lambda _: end())
        method = path.lstrip("/")
        if method not in self._not_own:
            for handlers in self._own:
                found = handlers.service(handler_call_details)
                if found is not None:
                    is_read = not path.startswith(_MANAGEMENT) or path.rpartition("/")[2].startswith("get")
                    return own_call(method, metadata, found, is_read=is_read)
            if self._calls.is_known(method):
                self._not_own.add(method)
        return self._calls.handler(method, metadata)
