"""A ModelMesh model path and model key, read into where the files are and how to run them.

Knows the JSON's fields, ModelMesh's and ours, and their ranges; nothing of storage or engines. Unknown fields are refused, since a
misspelt setting that is silently ignored costs more than an error.
"""

from typing import TypeVar

import msgspec

from runtime.errors import InvalidRequest
from runtime.types import DefaultSampling, ModelSettings, ModelSource, Quantization

# ModelMesh's own fields. `schema_path` and `disk_size_bytes` mean nothing here, `model_type` is the mesh's label.
_MESH_FIELDS = frozenset({"storage_key", "storage_params", "model_type", "schema_path", "bucket", "disk_size_bytes"})
_OUR_FIELDS = frozenset(field.name for field in msgspec.structs.fields(ModelSettings))
_SAMPLING_FIELDS = frozenset(field.name for field in msgspec.structs.fields(DefaultSampling))
T = TypeVar("T")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class _Storage(msgspec.Struct):
    storage_key: str | None = None
    storage_params: dict[str, str] = {}
    bucket: str | None = None


def parse_model(model_path: str, model_key: str) -> tuple[ModelSource, ModelSettings]:
    """Read what a LoadModelRequest says. Raises InvalidRequest naming the field."""
    fields = _object(model_key)
    if not model_path and "storage_key" not in fields and "storage_params" not in fields:
        raise InvalidRequest("the model path is empty: give a URI or a path", param="modelPath")
    unknown = sorted(set(fields) - _MESH_FIELDS - _OUR_FIELDS)
    if unknown:
        known = ", ".join(sorted(_OUR_FIELDS | _MESH_FIELDS))
        raise InvalidRequest(f"model key: unknown field {unknown[0]!r}; known fields are {known}", param=unknown[0])
    storage = _convert(
        {name: fields[name] for name in fields if name in ("storage_key", "storage_params", "bucket")}, _Storage
    )
    params = dict(storage.storage_params)
    if storage.bucket is not None:
        params.setdefault("bucket", storage.bucket)
    settings = _convert({name: fields[name] for name in fields if name in _OUR_FIELDS}, ModelSettings)
    sampling = fields.get("sampling")
    if isinstance(sampling, dict) and (strange := sorted(set(sampling) - _SAMPLING_FIELDS)):
        known = ", ".join(sorted(_SAMPLING_FIELDS))
        raise InvalidRequest(
            f"model key: unknown field 'sampling.{strange[0]}'; known fields are {known}",
            param=f"sampling.{strange[0]}",
        )
    check_settings(settings)
    return ModelSource(model_path, storage.storage_key or None, params), settings


def check_settings(settings: ModelSettings) -> None:
    """Raises InvalidRequest where a value is out of its range."""
    if settings.dtype not in _DTYPES:
        raise _out_of_range("dtype", settings.dtype, f"one of {', '.join(_DTYPES)}")
    if settings.double_quant and settings.quantize not in (Quantization.NF4, Quantization.FP4):
        raise InvalidRequest(
            f"double_quant needs quantize nf4 or fp4; quantize is {settings.quantize.value}", param="double_quant"
        )
    for name, value in (
        ("max_model_len", settings.max_model_len),
        ("max_concurrency", settings.max_concurrency),
        ("sampling.max_tokens", settings.sampling.max_tokens),
    ):
        if value is not None and value < 1:
            raise _out_of_range(name, value, "at least 1")
    sampling = settings.sampling
    if sampling.temperature is not None and not 0.0 <= sampling.temperature <= 100.0:
        raise _out_of_range("sampling.temperature", sampling.temperature, "0 to 100")
    if sampling.top_k is not None and sampling.top_k < 0:
        raise _out_of_range("sampling.top_k", sampling.top_k, "at least 0")
    if sampling.top_p is not None and not 0.0 < sampling.top_p <= 1.0:
        raise _out_of_range("sampling.top_p", sampling.top_p, "above 0 and at most 1")
    if sampling.min_p is not None and not 0.0 <= sampling.min_p <= 1.0:
        raise _out_of_range("sampling.min_p", sampling.min_p, "0 to 1")
    if sampling.repetition_penalty is not None and sampling.repetition_penalty <= 0.0:
        raise _out_of_range("sampling.repetition_penalty", sampling.repetition_penalty, "above 0")


def fingerprint(source: ModelSource, settings: ModelSettings) -> bytes:
    """Equal for equal loads."""
    return msgspec.json.encode((source, settings), order="sorted")


def _object(model_key: str) -> dict[str, object]:
    if not model_key.strip():
        return {}
    try:
        fields = msgspec.json.decode(model_key)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"model key: not valid JSON ({error})", param="modelKey") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"model key: a JSON object is needed, not {type(fields).__name__}", param="modelKey")
    return fields


def _convert(fields: dict[str, object], kind: type[T]) -> T:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"model key: {error}", param="modelKey") from None


def _out_of_range(name: str, value: object, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"model key: {name} is {value!r}; {allowed} is allowed", param=name)
