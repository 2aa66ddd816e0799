"""Describes registered models in the shapes of Ollama's API: what is registered, what is loaded, and one model that is not loaded."""

import hashlib
from datetime import UTC, datetime

import msgspec

from mesh.client.admin import Model

_NEVER = "9999-12-31T23:59:59Z"


class Details(msgspec.Struct, frozen=True):
    """A field is empty if it is not known before the model's first load."""

    format: str
    family: str
    families: list[str]
    quantization_level: str
    parameter_size: str = ""
    parent_model: str = ""


class Tag(msgspec.Struct, frozen=True):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Running(msgspec.Struct, frozen=True):
    """A loaded model. It does not expire: it stays until its memory is needed."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    size_vram: int
    context_length: int
    expires_at: str = _NEVER


class Shown(msgspec.Struct, frozen=True):
    details: Details
    model_info: dict[str, str]
    modified_at: str
    capabilities: tuple[str, ...] = ("completion",)
    template: str = ""
    modelfile: str = ""
    parameters: str = ""


def tag(model: Model) -> Tag:
    return Tag(model.name, model.name, _used_at(model), model.weight_bytes, _digest(model), _details(model))


def running(model: Model) -> Running:
    longest = max((copy.max_model_len for copy in model.copies), default=0)
    return Running(
        model.name, model.name, model.weight_bytes, _digest(model), _details(model), model.device_bytes, longest
    )


def shown(model: Model) -> Shown:
    """Describe a model that is not loaded: what its chat template can do is known only after a load."""
    return Shown(_details(model), {"general.source": model.uri}, _used_at(model))


def is_loaded(model: Model) -> bool:
    return model.status == "LOADED"


def _details(model: Model) -> Details:
    family = next((copy.architecture for copy in model.copies if copy.architecture), "")
    file_format = "gguf" if model.uri.lower().endswith(".gguf") else "safetensors"
    return Details(file_format, family, [family] if family else [], model.quantization)


def _digest(model: Model) -> str:
    """Return text that changes with the files and settings behind the name."""
    return hashlib.sha256(model.model_id.encode()).hexdigest()


def _used_at(model: Model) -> str:
    """Return the time of last use: the registry keeps no other time."""
    return datetime.fromtimestamp(model.last_used_ms / 1000, UTC).isoformat().replace("+00:00", "Z")
