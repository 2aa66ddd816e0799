"""Reads what a registration says about the number and the eviction of a model's copies."""

from functools import lru_cache

import msgspec

from common.model_key import InvalidModelKey, parse_model_key
from mesh.types import ModelInfo


class CopyPolicy(msgspec.Struct, frozen=True):
    """The settings of the same names in common/model_key.py. `max_copies` 0 means no limit, `idle_timeout_s` 0 never."""

    min_copies: int = 0
    max_copies: int = 0
    pinned: bool = False
    priority: int = 0
    idle_timeout_s: float = 0.0


DEFAULT_POLICY = CopyPolicy()


def policy_of(info: ModelInfo) -> CopyPolicy:
    """Return the policy in a model's key; the default one for a key that another runtime defines."""
    return _parse(info.key) if info.key else DEFAULT_POLICY


@lru_cache(maxsize=20_000)
def _parse(key: str) -> CopyPolicy:
    try:
        settings = parse_model_key(key).settings
    except InvalidModelKey:
        return DEFAULT_POLICY
    return CopyPolicy(
        settings.min_copies,
        settings.max_copies or 0,
        settings.pinned,
        settings.priority,
        settings.idle_timeout_s or 0.0,
    )
