"""Parses a ModelMesh model path and model key into where the files are and how to serve them."""

import msgspec

from common.model_key import InvalidModelKey, ModelSettings, Storage, parse_model_key
from runtime.errors import InvalidRequest
from runtime.types import ModelSource


def parse_model(model_path: str, model_key: str) -> tuple[ModelSource, ModelSettings]:
    """Read the path and the key of a LoadModelRequest. Raises InvalidRequest with the field's name."""
    try:
        key = parse_model_key(model_key)
    except InvalidModelKey as error:
        raise InvalidRequest(f"model key: {error.message}", param=error.field or "modelKey") from None
    storage = key.storage
    if not model_path and storage == Storage():
        raise InvalidRequest("the model path is empty: give a URI or a path", param="modelPath")
    params = dict(storage.storage_params)
    if storage.bucket is not None:
        params.setdefault("bucket", storage.bucket)
    return ModelSource(model_path, storage.storage_key or None, params), key.settings


def fingerprint(source: ModelSource, settings: ModelSettings) -> bytes:
    """Return bytes that are equal for equal loads."""
    return msgspec.json.encode((source, settings), order="sorted")
