"""Separates the copy settings of a model key (number and eviction of copies) from the settings that identify the model.

Copy settings may change while the model is loaded. They are kept in a property of the model's record; the key without them identifies the model.
"""

from functools import lru_cache
from typing import Any

import msgspec

from common.model_key import CopySettings, InvalidModelKey, parse_model_key
from mesh.types import ModelInfo

DEFAULT = CopySettings()
_NAMES = CopySettings.__struct_fields__


def identity_of(info: ModelInfo) -> ModelInfo:
    """Return the model without its copy settings. A key that is not Repertory's stays as it is."""
    return _split(info)[0] if mentions_copies(info.key) else info


def copy_settings_of(info: ModelInfo) -> CopySettings:
    """Return the copy settings in a model's key; the default ones for a key that is not Repertory's."""
    return _split(info)[1] if mentions_copies(info.key) else DEFAULT


def is_same_model(one: ModelInfo, other: ModelInfo) -> bool:
    """Return whether two registrations mean the same files and settings, whatever they say about copies and however their keys are written.

    Keys that are not of our schema are compared as texts, as in ModelMesh, and so is an empty key, unless the other key has copy settings.
    """
    if not (one.key and other.key) and not (mentions_copies(one.key) or mentions_copies(other.key)):
        return one == other
    one, other = identity_of(one), identity_of(other)
    return one == other or (
        (one.type, one.path) == (other.type, other.path)
        and _is_ours(one.key)
        and _is_ours(other.key)
        and _fields(one.key) == _fields(other.key)
    )


def _is_ours(key: str) -> bool:
    try:
        parse_model_key(key)
    except InvalidModelKey:
        return False
    return True


@lru_cache(maxsize=20_000)
def mentions_copies(key: str) -> bool:
    """Return whether a key may have copy settings."""
    return any(name in key for name in _NAMES)


@lru_cache(maxsize=20_000)
def _split(info: ModelInfo) -> tuple[ModelInfo, CopySettings]:
    try:
        copies = parse_model_key(info.key).copies
    except InvalidModelKey:
        return info, DEFAULT
    fields = {name: value for name, value in _fields(info.key).items() if name not in _NAMES}
    return ModelInfo(info.type, info.path, msgspec.json.encode(fields, order="deterministic").decode()), copies


def _fields(key: str) -> dict[str, Any]:
    """Return the fields of a key of our schema. Empty text is an empty key."""
    return msgspec.json.decode(key, type=dict[str, Any]) if key.strip() else {}
