"""The settings of a registered model, defined once for registration over HTTP, gRPC and the command line, and for loading.

A ModelMesh model key is a flat JSON object of these settings beside ModelMesh's own fields. To add a setting, add a field to `ModelSettings`,
or to `CopySettings` if it may change while the model is loaded: the command line's flags, the checks and the table in docs/configuration.md
follow from it.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from common.struct_schema import Field, fields_of

T = TypeVar("T", bound=msgspec.Struct)


class InvalidModelKey(ValueError):
    """A model key that no load could accept. `field` is the setting's name, dotted if nested, or empty for the key as a whole."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class Quantization(StrEnum):
    """Formats of the weights. `NONE` keeps the checkpoint's own numbers.

    INT8, NF4 and FP4 are bitsandbytes' formats. FP8 is e4m3 with one float32 scale per row.
    """

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"
    FP4 = "fp4"
    FP8 = "fp8"


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
GgufBlocks = Literal["auto", "keep", "unpack"]
_Name = Annotated[str, Meta(min_length=1)]
_Positive = Annotated[int, Meta(ge=1)]
_FOUR_BIT = (Quantization.NF4, Quantization.FP4)


class DefaultSampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling defaults of a model, from its registration or its generation_config.json. None stands for the API's own default."""

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    max_tokens: _Positive | None = None


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a model is served. The description of each field is its help text."""

    quantize: Annotated[
        Quantization, Meta(description="format of the weights: bitsandbytes' int8, nf4 or fp4, or fp8 by row")
    ] = Quantization.NONE
    double_quant: Annotated[bool, Meta(description="quantise the scales of nf4 and fp4 too")] = False
    gguf_blocks: Annotated[
        GgufBlocks,
        Meta(
            description="Q4_0 and IQ4_NL blocks of GGUF files; auto = keep on a GPU, unpack on a CPU, where that is faster"
        ),
    ] = "auto"
    dtype: Annotated[
        Dtype, Meta(description="of the arithmetic; auto = the checkpoint's on a GPU, float32 on a CPU")
    ] = "auto"
    max_model_len: Annotated[
        _Positive | None, Meta(description="context limit in tokens; not given = the checkpoint's")
    ] = None
    chat_template: Annotated[
        str | None, Meta(description="Jinja text, or @FILE on the command line; not given = the checkpoint's")
    ] = None
    sampling: Annotated[
        DefaultSampling, Meta(description="defaults for requests that leave a sampling parameter out")
    ] = DefaultSampling()
    tensor_parallel: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | Literal["auto"],
        Meta(description="GPUs that share the model; auto = the smallest group in which it fits"),
    ] = "auto"
    adapter_of: Annotated[
        _Name | None, Meta(description="name of the base model: the files are a LoRA adapter of it")
    ] = None
    max_concurrency: Annotated[_Positive | None, Meta(description="limit of running and waiting requests per copy")] = (
        None
    )
    version: Annotated[
        str | None, Meta(description="any text; change it to reload files that changed under the same URI")
    ] = None
    display_name: Annotated[str | None, Meta(description="the model's name in answers; registration sets it")] = None


class CopySettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many copies a mesh keeps of a model, and which it evicts first. A change applies to loaded models at once; a runtime ignores these settings."""

    min_copies: Annotated[
        int, Meta(ge=0, description="copies that the mesh keeps loaded while enough pods can hold them")
    ] = 0
    max_copies: Annotated[
        _Positive | None, Meta(description="largest number of copies that the mesh loads; not given = one per pod")
    ] = None
    pinned: Annotated[bool, Meta(description="never evict a copy for another model")] = False
    priority: Annotated[int, Meta(ge=-100, le=100, description="models of a lower priority are evicted first")] = 0
    idle_timeout_s: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="seconds without a request after which all copies are unloaded; not given = never"),
    ] = None


class Storage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the model's files are reached. Holds no secret: `storage_key` names the storage-config entry that does."""

    storage_key: Annotated[
        str | None, Meta(description="name of the storage-config entry that holds the source's credentials")
    ] = None
    storage_params: Annotated[
        dict[str, str], Meta(description="parameters of the source, such as bucket, region or endpoint_url")
    ] = {}
    bucket: Annotated[str | None, Meta(description="the older spelling of storage_params' bucket")] = None


class ModelKey(msgspec.Struct, frozen=True):
    """A model key that has been checked."""

    settings: ModelSettings = ModelSettings()
    storage: Storage = Storage()
    copies: CopySettings = CopySettings()

    def given(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults as JSON values: equal keys give equal results."""
        return {
            name: msgspec.to_builtins(value)
            for part in (self.settings, self.copies, self.storage)
            for name, value, default in _values(part)
            if value != default
        }


# ModelMesh writes these into a key; they change nothing here.
_MESH_FIELDS = frozenset({"model_type", "schema_path", "disk_size_bytes"})
_OF_THE_BASE = ("quantize", "double_quant", "gguf_blocks", "dtype", "max_model_len", "tensor_parallel")
_PARTS: tuple[type[msgspec.Struct], ...] = (ModelSettings, CopySettings, Storage)
_NOT_REGISTRABLE = frozenset({"display_name", "bucket"})


def parse_model_key(text: str) -> ModelKey:
    """Read the JSON text of a model key; empty text is an empty key. Raises InvalidModelKey."""
    if not text.strip():
        return ModelKey()
    try:
        fields = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise InvalidModelKey("", f"not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InvalidModelKey("", f"must be a JSON object, not {type(fields).__name__}")
    return read_model_key({name: value for name, value in fields.items() if name not in _MESH_FIELDS})


def read_model_key(fields: Mapping[str, Any]) -> ModelKey:
    """Check decoded settings completely. A null is a setting that is not given. Raises InvalidModelKey."""
    _refuse_unknown(fields, tuple(field for kind in _PARTS for field in fields_of(kind)), "")
    key = ModelKey(_part(ModelSettings, fields), _part(Storage, fields), _part(CopySettings, fields))
    if key.settings.double_quant and key.settings.quantize not in _FOUR_BIT:
        raise InvalidModelKey(
            "double_quant",
            f"double_quant needs quantize nf4 or fp4; quantize is {key.settings.quantize.value}",
        )
    if key.settings.gguf_blocks == "keep" and key.settings.quantize is not Quantization.NONE:
        raise InvalidModelKey(
            "gguf_blocks",
            f"gguf_blocks keep excludes quantize {key.settings.quantize.value}: weights have one format",
        )
    _check_adapter(key.settings)
    return key


def _part(kind: type[T], fields: Mapping[str, Any]) -> T:
    return _read(kind, {name: value for name, value in fields.items() if name in kind.__struct_fields__})


def _check_adapter(settings: ModelSettings) -> None:
    """Refuse settings that an adapter takes from its base."""
    if settings.adapter_of is None:
        return
    for name in _OF_THE_BASE:
        if getattr(settings, name) != getattr(ModelSettings(), name):
            raise InvalidModelKey(
                name, f"{name} cannot be given with adapter_of: an adapter has that of its base, {settings.adapter_of}"
            )


def registrable_fields() -> tuple[Field, ...]:
    """Return the settings that a registration may give, in the order of the schema."""
    return tuple(field for kind in _PARTS for field in fields_of(kind) if field.name not in _NOT_REGISTRABLE)


def _read(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    fields = fields_of(kind)
    _refuse_unknown(values, fields, prefix)
    given: dict[str, Any] = {}
    for field in fields:
        value = values.get(field.name)
        if value is None:
            continue
        name = prefix + field.name
        if field.fields and isinstance(value, Mapping):
            given[field.name] = _read(type(field.default), value, f"{name}.")
            continue
        try:
            given[field.name] = msgspec.convert(value, field.type)
        except msgspec.ValidationError:
            # an object may hold a secret that does not belong there
            given_as = "" if isinstance(value, Mapping | list) else f"is {value!r}; it "
            raise InvalidModelKey(name, f"{name} {given_as}must be {field.allowed}") from None
    return kind(**given)


def _refuse_unknown(values: Mapping[str, Any], fields: tuple[Field, ...], prefix: str) -> None:
    names = {field.name for field in fields}
    unknown = sorted(set(values) - names)
    if unknown:
        name = prefix + unknown[0]
        known = ", ".join(sorted(names if prefix else names | _MESH_FIELDS))
        raise InvalidModelKey(name, f"unknown field {name!r}; known fields are {known}")


def _values(part: msgspec.Struct) -> Iterator[tuple[str, Any, Any]]:
    empty = type(part)()
    for name in part.__struct_fields__:
        yield name, getattr(part, name), getattr(empty, name)
