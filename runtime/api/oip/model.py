"""Finds the model of a request of the Open Inference Protocol, and describes it."""

from runtime.api.model_lookup import find_model
from runtime.errors import InvalidRequest
from runtime.interfaces import ModelDirectory, ServedModel

VERSION = "1"
PLATFORM = "repertory"


def model_named(directory: ModelDirectory, header: str | None, name: str, version: str) -> ServedModel:
    """Return the model of the mesh's header, or of the name. Raises InvalidRequest for a version other than 1, ModelNotFound."""
    model = find_model(directory, header, name)
    if version not in ("", VERSION):
        # Not ModelNotFound, at which a mesh would load the model again.
        raise InvalidRequest(f"it has no version {version}, only {VERSION}", model=shown_name(model, name))
    return model


def shown_name(model: ServedModel, asked: str) -> str:
    """Return the name for the response: as the client wrote it, but not an id that a mesh put in its place."""
    return model.name if asked in ("", model.model_id) else asked


def properties_of(model: ServedModel) -> dict[str, str]:
    """Return the facts that its metadata has beyond the protocol."""
    facts = model.facts
    return {
        "architecture": facts.architecture,
        "dtype": facts.dtype,
        "quantization": facts.quantization.value,
        "max_model_len": str(facts.max_model_len),
        "vocab_size": str(facts.vocab_size),
        "num_parameters": str(facts.num_parameters),
    }
