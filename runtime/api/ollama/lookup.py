"""Finds the model of a request of Ollama's clients, which add a tag to a name that has none."""

from runtime.api.model_lookup import find_model
from runtime.errors import ModelNotFound
from runtime.interfaces import ModelDirectory, ServedModel

_TAG = ":latest"


def find_tagged(directory: ModelDirectory, header: str | None, asked: str) -> ServedModel:
    """Return the model that the header or the body names, with or without the tag. Raises InvalidRequest or ModelNotFound."""
    try:
        return find_model(directory, header, asked)
    except ModelNotFound:
        if header or not asked.endswith(_TAG):
            raise
    return find_model(directory, None, asked.removesuffix(_TAG))
