"""Makes the model ids behind registered names, and checks names and settings.

A name is a vmodel that points at `NAME__<hash of source and settings>`, as in ModelMesh's controller. The same name with other files or
settings is another model id, which is loaded beside the old one. The name moves to it when it is loaded.
"""

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from common.model_id import InvalidModelId, check_model_id, shown_id
from common.model_key import InvalidModelKey, parse_model_key, read_model_key
from mesh.errors import InvalidRequest
from mesh.registry.copy_settings import identity_of
from mesh.types import ModelInfo

DEFAULT_TYPE = "llm"
HASH_DIGITS = 10
MAX_NAME_LENGTH = 200

_CONCRETE = re.compile(rf"__[0-9a-f]{{{HASH_DIGITS}}}$")


def model_info(name: str, uri: str, settings: Mapping[str, Any], *, model_type: str = DEFAULT_TYPE) -> ModelInfo:
    """Return the path and the model key of a registration. The key does not depend on the order of the settings.

    Raises InvalidRequest for settings with which no load could succeed.
    """
    with _refusals(f"model {name}"):
        key = read_model_key(settings)
    if key.settings.display_name is not None:
        raise InvalidRequest(f"model {name}: display_name is always the registered name: leave it out")
    fields = {"model_type": model_type, "display_name": name, **key.given()}
    return ModelInfo(model_type, uri, msgspec.json.encode(fields, order="deterministic").decode())


def check_key(info: ModelInfo) -> None:
    """Raise InvalidRequest for a model of the default type whose key no load could accept.

    The keys of other types belong to other runtimes, and may be any text.
    """
    if info.type == DEFAULT_TYPE:
        with _refusals("model key"):
            parse_model_key(info.key)


def settings_of(info: ModelInfo) -> Mapping[str, Any]:
    """Return the fields of a model key, or nothing if the key is not a JSON object."""
    try:
        return msgspec.json.decode(info.key or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def base_of(info: ModelInfo) -> str:
    """Return the name of the model whose LoRA adapter this is, or "" if it is none."""
    name = settings_of(info).get("adapter_of") if info.type == DEFAULT_TYPE else None
    return name if isinstance(name, str) else ""


def over_base(info: ModelInfo, base_id: str) -> ModelInfo:
    """Return an adapter's key with the id of its base in the place of the base's name."""
    fields = {**settings_of(info), "adapter_of": base_id}
    return ModelInfo(info.type, info.path, msgspec.json.encode(fields, order="deterministic").decode())


def with_settings(info: ModelInfo, settings: Mapping[str, Any], *, model_type: str | None = None) -> ModelInfo:
    """Return the same files with other settings. Raises InvalidRequest if the key is not a JSON object or the result is invalid."""
    try:
        key = msgspec.json.decode(info.key or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        raise InvalidRequest("the model's key is not a JSON object, so settings cannot be added to it") from None
    merged = {**key, **settings}
    if model_type is not None:
        merged["model_type"] = model_type
    changed = ModelInfo(model_type or info.type, info.path, msgspec.json.encode(merged, order="deterministic").decode())
    check_key(changed)
    return changed


@contextlib.contextmanager
def _refusals(subject: str) -> Iterator[None]:
    try:
        yield
    except InvalidModelKey as error:
        raise InvalidRequest(f"{subject}: {error.message}") from None


def concrete_id(name: str, info: ModelInfo) -> str:
    """Return the model id of a registration by name. It does not depend on the copy settings, which may change while the model is loaded."""
    content = msgspec.json.encode((info.type, info.path, identity_of(info).key))
    return f"{name}__{hashlib.sha1(content, usedforsecurity=False).hexdigest()[:HASH_DIGITS]}"


def belongs_to(model_id: str, name: str) -> bool:
    """Return whether registering the name made this id."""
    return model_id.startswith(f"{name}__") and bool(_CONCRETE.fullmatch(model_id[len(name) :]))


@functools.lru_cache(maxsize=16_384)
def name_in(model_id: str) -> str:
    """Return the name that an id was made from, or the id itself if it was not made from a name. Each call needs it for several metrics."""
    return _CONCRETE.sub("", model_id) or model_id


def check_id(model_id: str, what: str = "model id") -> None:
    """Raise InvalidRequest for an id of a model or vmodel that breaks the naming rule."""
    try:
        check_model_id(model_id, what)
    except InvalidModelId as error:
        raise InvalidRequest(str(error)) from None


def check_name(name: str) -> None:
    """Raise InvalidRequest for a name that headers or URLs would change. Slashes are allowed (`org/model`).

    A name of `register` and `alias` is stricter than an id: people type it into URLs and command lines.
    """
    check_id(name, "name")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"name {shown_id(name)} is {len(name)} characters long; the limit is {MAX_NAME_LENGTH}")
    bad = next((character for character in name if character.isspace() or character in "?#,"), None)
    if bad is not None:
        raise InvalidRequest(f"name {name!r} may not contain {bad!r}")
    if name.startswith("*"):
        raise InvalidRequest(f"name {name!r} may not begin with '*'")
    # Clients and proxies shorten such paths.
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidRequest(f"name {name!r} may not begin or end with '/', nor have a part that is empty, '.' or '..'")
