"""Reads the model's name from a gRPC request and filters the metadata that is forwarded, by ModelMesh's conventions."""

from collections.abc import Mapping, Sequence

import msgspec

from common.log_headers import LOG_HEADERS
from common.reloaded_setting import ReloadedSetting
from mesh.access.peer_keys import PEER_HEADERS
from mesh.api.adapter_choice import AdapterChoice
from mesh.api.call_metadata import CallMetadata, Metadata
from mesh.api.protobuf_field import extract, text_tag
from mesh.envoy.routes import CALLED_HEADER
from mesh.errors import InvalidRequest, NotSupported

REQUEST_ID_HEADER = "x-request-id"
PREFIX_HEADER = "repertory-prefix-hash"
MODEL_HEADER = "mm-model-id"
VMODEL_HEADER = "mm-vmodel-id"
_MODEL_BIN, _VMODEL_BIN = f"{MODEL_HEADER}-bin", f"{VMODEL_HEADER}-bin"
REQUIRED_HEADER = "mm-required"  # with several ids: "all" fails the request if a model does not exist

# Services between a mesh and its runtime, and gRPC's own, which each server has: callers must not reach a runtime's.
_NEVER_FORWARDED = (
    "mmesh.ModelRuntime/",
    "com.ibm.watson.modelmesh.ModelRuntime/",
    "com.ibm.watson.tas.proto.",
    "com.ibm.watson.tas.internal.proto.",
    "mmesh.ModelMesh/",
    "repertory.",
    "grpc.",
)
_RESERVED = frozenset({"tas-model-id", "content-type", "user-agent", "te", *PEER_HEADERS, *LOG_HEADERS, PREFIX_HEADER})
_RESERVED_TO_PODS = _RESERVED | {REQUEST_ID_HEADER}
_RESERVED_TO_RUNTIME = _RESERVED_TO_PODS | {"authorization"}
_OF_CONNECTION = frozenset({"content-type", "user-agent", "te", REQUEST_ID_HEADER})
_TRANSPORT = ("mm-", "grpc-", ":")
# A status' details belong to the application although their key begins with grpc-.
_APPLICATION = "grpc-status-details-bin"


class Address(msgspec.Struct, frozen=True):
    """A name as the caller wrote it, which need not be registered. `virtual`: it must be the name of a vmodel."""

    name: str
    virtual: bool


class _Rpc(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: tuple[int, ...] = msgspec.field(default=(), name="idExtractionPath")
    is_vmodel: bool = msgspec.field(default=False, name="vModelId")


class DataplaneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ModelMesh's MM_DATAPLANE_CONFIG."""

    rpcs: dict[str, _Rpc] = msgspec.field(default_factory=dict, name="rpcConfigs")
    allow_others: bool = msgspec.field(default=False, name="allowOtherRpcs")


# These services name the model, or a vmodel, in the message; the paths hold unless a configuration replaces them.
_BUILT_IN_PATHS: Mapping[str, tuple[int, ...]] = {
    "fmaas.GenerationService": (1,),
    "inference.GRPCInferenceService": (1,),
}
# The fields that name an adapter of the model, the one that wins first.
_ADAPTER_FIELDS: Mapping[str, tuple[tuple[str, int], ...]] = {
    "fmaas.GenerationService/Generate": (("adapter_id", 4), ("prefix_id", 2)),
    "fmaas.GenerationService/GenerateStream": (("adapter_id", 4), ("prefix_id", 2)),
    "fmaas.GenerationService/Tokenize": (("adapter_id", 7), ("prefix_id", 6)),
}


class Addressing:
    """Applies a dataplane configuration (JSON, or `@FILE`, which is read again when it changes), or the built-in paths without one.

    Raises ConfigError for a configuration that cannot be read.
    """

    def __init__(self, text: str) -> None:
        self._setting = ReloadedSetting[DataplaneConfig | None]("dataplane_config", text, _parse, default=None)

    def check_allowed(self, method: str) -> None:
        """Raise NotSupported unless the method, `package.Service/Method`, may be called."""
        if method.startswith(_NEVER_FORWARDED):
            raise NotSupported(f"{method}: UNIMPLEMENTED: Method not found or not permitted: {method}")
        config = self._setting.value
        if config is not None and not config.allow_others and method not in config.rpcs:
            raise NotSupported(f"Method not found or not permitted: {method}")

    def wants_message(self, method: str, metadata: CallMetadata) -> bool:
        """Whether the model, or its adapter, can only be known from the first message."""
        return method in _ADAPTER_FIELDS or self._configured(method) is not None or not _from_headers(metadata)

    def addresses(self, method: str, metadata: CallMetadata, message: bytes | None) -> tuple[Address, ...]:
        """Return the models that a request is for, in the order of its headers; usually one.

        A configured path in the message wins over headers, headers over the built-in paths. Raises InvalidRequest.
        """
        configured = self._configured(method)
        if configured is not None and message is not None:
            name = _extract(method, message, configured.path)
            if name:
                return (Address(name, configured.is_vmodel),)
        if addresses := _from_headers(metadata):
            return addresses
        path = _BUILT_IN_PATHS.get(method.partition("/")[0])
        if path and message is not None:
            name = _extract(method, message, path)
            if name:
                return (Address(name, False),)
        raise InvalidRequest("must include mm-model-id header")

    def adapter(self, method: str, message: bytes | None) -> AdapterChoice | None:
        """Return the adapter that a message selects, None if it selects none. Raises InvalidRequest."""
        for field, number in _ADAPTER_FIELDS.get(method, ()):
            # A message that has the field has its tag, and few others have that byte.
            if message is None or text_tag(number) not in message:
                continue
            if name := _extract(method, message, (number,)):
                return AdapterChoice(field, name)
        return None

    def _configured(self, method: str) -> _Rpc | None:
        config = self._setting.value
        rpc = config.rpcs.get(method) if config is not None else None
        return rpc if rpc is not None and rpc.path else None


def _parse(content: bytes) -> DataplaneConfig:
    return msgspec.json.decode(content, type=DataplaneConfig)


def _extract(method: str, message: bytes, path: Sequence[int]) -> str | None:
    try:
        return extract(message, path)
    except ValueError as error:
        raise InvalidRequest(f"{method}: the request message cannot be read: {error}") from None


def _from_headers(metadata: CallMetadata) -> tuple[Address, ...]:
    models, vmodels = _ids(metadata, MODEL_HEADER, _MODEL_BIN), _ids(metadata, VMODEL_HEADER, _VMODEL_BIN)
    if models and vmodels:
        raise InvalidRequest("must include only one of model id and vmodel id")
    if not models and not vmodels:
        models = metadata.all("tas-model-id")[:1]
    if "" in models or "" in vmodels:
        raise InvalidRequest(f"provided {'v' if vmodels else ''}model-id header must be non-empty")
    return tuple(Address(name, virtual=bool(vmodels)) for name in vmodels or models)


def _ids(metadata: CallMetadata, key: str, binary_key: str) -> list[str]:
    if key in metadata:
        return metadata.all(key)
    return metadata.all(binary_key) if binary_key in metadata else []


def onward(
    metadata: Metadata, model_id: str, *, peer_headers: Sequence[tuple[str, str]] = ()
) -> list[tuple[str, str | bytes]]:
    """Return the metadata for a target: the caller's own headers but for the request id, and the concrete model id.

    `peer_headers`: of a target that is another pod. The bearer key goes to pods only, never to a runtime.
    """
    dropped = _RESERVED_TO_PODS if peer_headers else _RESERVED_TO_RUNTIME
    passed = _passed(metadata, dropped)
    passed.append((_MODEL_BIN, model_id.encode()))
    if model_id.isascii() and model_id.isprintable():
        passed.append((MODEL_HEADER, model_id))
    passed.extend(peer_headers)
    return passed


def as_called(metadata: Metadata) -> Metadata:
    """Return the metadata of a call from Envoy as the caller sent it: a copy has refused the call, before which Envoy replaced the name by the model's id."""
    name = next((value for key, value in metadata if key == CALLED_HEADER), None)
    if name is None:
        return metadata
    written = (CALLED_HEADER, MODEL_HEADER, _MODEL_BIN)
    return (*((key, value) for key, value in metadata if key not in written), (MODEL_HEADER, name))


def unread(metadata: Metadata) -> list[tuple[str, str | bytes]]:
    """Return the metadata for a process of this pod that handles the call as if it were the first: all but the transport's, and the request id."""
    return [
        (key, value)
        for key, value in metadata
        if key not in _OF_CONNECTION and (not key.startswith(("grpc-", ":")) or key == _APPLICATION)
    ]


def backward(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """Return the headers or trailers of a response without those of the transport and of the mesh."""
    return tuple(_passed(metadata, _RESERVED)) if metadata else ()


def _passed(metadata: Metadata, dropped: frozenset[str]) -> list[tuple[str, str | bytes]]:
    return [
        (key, value)
        for key, value in metadata
        if (key not in dropped and not key.startswith(_TRANSPORT)) or key == _APPLICATION
    ]
