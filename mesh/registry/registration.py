"""Names that people register, and the model ids behind them.

Pure. A name is a vmodel that points at `NAME__<hash of source and settings>`, as ModelMesh's controller does it: the same name with other
files or settings is another model id, loaded beside the old one and switched to when it is ready.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from mesh.errors import InvalidRequest
from mesh.types import ModelInfo

HASH_DIGITS = 10
MAX_NAME_LENGTH = 200

_CONCRETE = re.compile(rf"__[0-9a-f]{{{HASH_DIGITS}}}$")


Positive = Annotated[int, msgspec.Meta(gt=0)]
Quantize = Literal["none", "int8", "nf4", "fp4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A model's default sampling; None: the checkpoint's own. Ranges are checked when a registration is read, long before a load."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_tokens: Positive | None = None


class Registration(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a person says of a model: where its files are and how it is to be served. None: the checkpoint's own, or the runtime's default.

    `version` distinguishes files that changed under the same URI.
    """

    name: str
    uri: str
    type: str = "llm"
    quantize: Quantize | None = None
    double_quant: bool = False
    dtype: Dtype | None = None
    max_model_len: Positive | None = None
    chat_template: str | None = None
    sampling: Sampling | None = None
    max_concurrency: Positive | None = None
    storage_key: str | None = None
    storage_params: dict[str, str] | None = None
    version: str | None = None

    def info(self) -> ModelInfo:
        """Path and ModelMesh model key; the key's text is the same for the same settings, in whatever order they were given."""
        key: dict[str, Any] = {
            "model_type": self.type,
            "storage_key": self.storage_key,
            "storage_params": self.storage_params or None,
            "quantize": self.quantize,
            "double_quant": self.double_quant or None,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "chat_template": self.chat_template,
            "sampling": self.sampling if self.sampling != Sampling() else None,
            "max_concurrency": self.max_concurrency,
            "version": self.version,
            "display_name": self.name,
        }
        given = {name: value for name, value in key.items() if value is not None}
        return ModelInfo(self.type, self.uri, msgspec.json.encode(given, order="deterministic").decode())


def settings_of(info: ModelInfo) -> Mapping[str, Any]:
    """The model key as a person may read it back; empty if it isn't a JSON object."""
    try:
        return msgspec.json.decode(info.key or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def with_settings(info: ModelInfo, settings: Mapping[str, Any]) -> ModelInfo:
    """The same files with other settings, by their names in a model key. Raises InvalidRequest if the key is nobody's but its runtime's."""
    try:
        key = msgspec.json.decode(info.key or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        raise InvalidRequest("the model's key is no JSON object: settings can't be put into it") from None
    named = {("model_type" if name == "type" else name): value for name, value in settings.items()}
    return ModelInfo(
        settings.get("type", info.type),
        info.path,
        msgspec.json.encode({**key, **named}, order="deterministic").decode(),
    )


def concrete_id(name: str, info: ModelInfo) -> str:
    content = msgspec.json.encode((info.type, info.path, info.key))
    return f"{name}__{hashlib.sha1(content, usedforsecurity=False).hexdigest()[:HASH_DIGITS]}"


def belongs_to(model_id: str, name: str) -> bool:
    """Whether this id is one that registering the name has made."""
    return model_id.startswith(f"{name}__") and bool(_CONCRETE.fullmatch(model_id[len(name) :]))


def name_in(model_id: str) -> str:
    """The name that an id was made from; an id that wasn't made from one is its own."""
    return _CONCRETE.sub("", model_id) or model_id


def check_name(name: str) -> None:
    """Raises InvalidRequest. Slashes are fine (`org/model`); what would be lost in a header or a URL is not."""
    if not name:
        raise InvalidRequest("must provide a non-empty name")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(f"name {name[:40]!r}… is {len(name)} characters long; the limit is {MAX_NAME_LENGTH}")
    bad = next(
        (character for character in name if not character.isprintable() or character.isspace() or character in "?#,"),
        None,
    )
    if bad is not None:
        raise InvalidRequest(f"name {name!r} may not contain {bad!r}")
    if name.startswith("*"):
        raise InvalidRequest(f"name {name!r} may not begin with '*'")
    # clients and proxies shorten such paths on their way
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidRequest(f"name {name!r} may not begin or end with '/', nor have a part that is empty, '.' or '..'")
