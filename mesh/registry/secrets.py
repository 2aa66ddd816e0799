"""Refuses registrations that contain secrets, because every pod and every reader of the store can read the registry."""

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, urlsplit

import msgspec

from mesh.errors import InvalidRequest
from mesh.types import ModelInfo

_SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|passphrase|credentials?|authorization|signature|sig|sas|cookie|connection_string"
    r"|(access|api|private|account|client|secret|shared|encryption)_?key)$"
)
_NOT_SECRET = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|stop)_token$")
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def refuse_secrets(name: str, info: ModelInfo) -> None:
    """Raise InvalidRequest, which names the first parameter of the model key or the path that looks like a secret."""
    try:
        entries = list(_entries_in_key(info.key))
    except RecursionError:
        raise InvalidRequest(f"model {name}: the model key is nested too deeply") from None
    for field, value in entries:
        if looks_secret(field) or (field.startswith("storage_params.") and _secret_in_uri(value)):
            raise InvalidRequest(
                f"model {name}: the model key's {field!r} looks like a secret, and the registry is readable by every pod; "
                "put it into a storage configuration file of the runtime and name that with storage_key"
            )
    found = _secret_in_uri(info.path)
    if found:
        raise InvalidRequest(
            f"model {name}: the path contains a secret ({found}), and the registry is readable by every pod; "
            "put it into a storage configuration file of the runtime and name that with storage_key"
        )


def looks_secret(name: str) -> bool:
    """Judge a name by its last part: True for `secretAccessKey`, `hf_token`, `headers.Authorization`; False for `access_key_id`, `max_tokens`."""
    last = re.split(r"[./]", name)[-1]
    plain = _WORD_START.sub("_", last).replace("-", "_").lower()
    return bool(_SECRET.search(plain)) and not _NOT_SECRET.match(plain)


def _entries_in_key(key: str) -> Iterator[tuple[str, str]]:
    try:
        content = msgspec.json.decode(key) if key else None
    except msgspec.MsgspecError:
        # A key that is not JSON is opaque to the mesh. The runtime checks it.
        return
    yield from _entries(content, "")


def _entries(value: object, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield each text with its dotted path, also from objects that are encoded as a text, as ModelMesh's parameters are."""
    if isinstance(value, dict):
        for name, inner in value.items():
            path = f"{prefix}{name}"
            held = _object_in(inner) if isinstance(inner, str) else inner
            if isinstance(held, dict | list):
                yield from _entries(held, f"{path}.")
            elif inner not in (None, ""):
                yield path, inner if isinstance(inner, str) else ""
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, prefix)


def _object_in(text: str) -> object:
    if not text.lstrip().startswith("{"):
        return None
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return None


def _secret_in_uri(uri: str) -> str | None:
    try:
        parts = urlsplit(uri)
        if parts.password:
            return "a password before the host"
        return next((f"query parameter {name!r}" for name, _ in parse_qsl(parts.query) if looks_secret(name)), None)
    except ValueError:
        return None
