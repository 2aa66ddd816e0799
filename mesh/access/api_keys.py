"""Defines API keys and reads the file of keys. Only hashes of the keys are kept.

    keys:
      - name: chat-ui
        sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        scopes: [inference]
        models: ["org/*", smol]
        requests_per_minute: 600
        max_concurrent: 16

Keys are random and long, so one round of SHA-256 is enough to make the file useless for calling.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.config import read_mapping
from common.errors import ConfigError
from mesh.access.caller import EVERY_MODEL, Caller
from mesh.access.scopes import Scope, Scopes

_SECRET_BYTES = 32
_PREFIX = "rk-"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[\x21-\x7e]{1,64}")
_ALL_SCOPES = tuple(Scope)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What one key allows. A limit of 0 is none. Several `digests` are several secrets with the same rights, for a change without a gap."""

    name: str
    digests: frozenset[str]
    scopes: Scopes
    models: tuple[str, ...] = EVERY_MODEL
    requests_per_minute: int = 0
    max_concurrent: int = 0
    caller: Caller = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "caller", Caller(self.name, self.models, may_manage=Scope.MANAGEMENT in self.scopes))


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    sha256: str | tuple[str, ...]
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    models: tuple[str, ...] = EVERY_MODEL
    requests_per_minute: Annotated[int, Meta(ge=0)] = 0
    max_concurrent: Annotated[int, Meta(ge=0)] = 0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[_Entry, ...] = ()


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def new_secret() -> str:
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def plain_keys(values: Iterable[str]) -> tuple[ApiKey, ...]:
    """Return the keys of the setting `api_keys`, each of which allows everything."""
    return tuple(
        ApiKey(f"key-{number}", frozenset({digest_of(value)}), frozenset(_ALL_SCOPES))
        for number, value in enumerate(values, 1)
    )


def read_key_file(path: str) -> tuple[ApiKey, ...]:
    """Read a YAML or JSON file of keys. Raises ConfigError naming the file and the entry."""
    content: Mapping[str, Any] = read_mapping(path)
    try:
        entries = msgspec.convert(content, _File).keys
    except msgspec.ValidationError as error:
        raise ConfigError(f"api_keys_file {path}: {error}") from None
    keys = tuple(_key(entry, path) for entry in entries)
    _refuse_duplicates(path, "name", [key.name for key in keys])
    _refuse_duplicates(path, "sha256", [digest for key in keys for digest in key.digests])
    return keys


def _key(entry: _Entry, path: str) -> ApiKey:
    digests = (entry.sha256,) if isinstance(entry.sha256, str) else entry.sha256
    where = f"api_keys_file {path}: key {entry.name[:64]!r}"
    if not _NAME.fullmatch(entry.name):
        raise ConfigError(f"{where}: the name must have 1 to 64 printable ASCII characters and no space")
    if not digests or not all(_DIGEST.fullmatch(digest) for digest in digests):
        raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits in lower case, or a list of such")
    if not entry.scopes or not entry.models:
        raise ConfigError(f"{where}: without scopes and models it allows nothing; remove the key instead")
    return ApiKey(
        entry.name,
        frozenset(digests),
        frozenset(entry.scopes),
        EVERY_MODEL if "*" in entry.models else entry.models,
        entry.requests_per_minute,
        entry.max_concurrent,
    )


def _refuse_duplicates(path: str, what: str, values: list[str]) -> None:
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise ConfigError(f"api_keys_file {path}: two keys have the {what} {repeated}")
