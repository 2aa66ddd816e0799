"""Reads a checkpoint's tokenizer files: names of special tokens, chat templates and default sampling.

The files are tokenizer_config.json, generation_config.json, chat_template.jinja and additional_chat_templates/.
"""

import logging
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.model_key import DefaultSampling
from runtime.errors import LoadFailed

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T", int, float)

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenSpec(msgspec.Struct, frozen=True):
    """An added token, with the field names of tokenizer_config.json."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class TokenizerConfig(msgspec.Struct, frozen=True):
    """The fields of tokenizer_config.json that affect tokenization and templates."""

    bos_token: str | TokenSpec | bool | None = None
    eos_token: str | TokenSpec | bool | None = None
    unk_token: str | TokenSpec | bool | None = None
    sep_token: str | TokenSpec | bool | None = None
    pad_token: str | TokenSpec | bool | None = None
    cls_token: str | TokenSpec | bool | None = None
    mask_token: str | TokenSpec | bool | None = None
    additional_special_tokens: list[str | TokenSpec] | None = None
    extra_special_tokens: list[str | TokenSpec] | dict[str, str | TokenSpec] | None = (
        None  # transformers 5's name for it
    )
    model_specific_special_tokens: dict[str, str | TokenSpec] | None = None
    added_tokens_decoder: dict[str, TokenSpec] = {}
    chat_template: str | list[NamedTemplate] | None = None
    response_template: Any = None  # unchecked

    def named_tokens(self) -> dict[str, str]:
        """Return the texts of the named tokens that the checkpoint has, by name (`bos_token`, …). Templates may use these names."""
        found: dict[str, str] = {}
        for name in NAMED_TOKENS:
            value = getattr(self, name)
            if isinstance(value, TokenSpec):
                found[name] = value.content
            elif isinstance(value, str) and value:
                found[name] = value
        extra = self.extra_special_tokens if isinstance(self.extra_special_tokens, dict) else {}
        for name, token in {**extra, **(self.model_specific_special_tokens or {})}.items():
            found[name] = token.content if isinstance(token, TokenSpec) else token
        return found

    def unnamed_tokens(self) -> list[TokenSpec]:
        """Return the special tokens that have no name."""
        extra = self.extra_special_tokens if isinstance(self.extra_special_tokens, list) else []
        return [
            token if isinstance(token, TokenSpec) else TokenSpec(token)
            for token in [*(self.additional_special_tokens or ()), *extra]
        ]


class GenerationConfig(msgspec.Struct, frozen=True):
    """The sampling defaults of generation_config.json, unchecked. The engine reads its EOS ids."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def sampling(self) -> DefaultSampling:
        """Return the defaults that are in their ranges, and log the others: no request could be drawn with them."""
        return DefaultSampling(
            temperature=_in_range("temperature", self.temperature),
            top_k=_in_range("top_k", self.top_k),
            top_p=_in_range("top_p", self.top_p),
            min_p=_in_range("min_p", self.min_p),
            repetition_penalty=_in_range("repetition_penalty", self.repetition_penalty),
            max_tokens=_in_range("max_tokens", self.max_new_tokens),
        )


def _in_range(name: str, value: _T | None) -> _T | None:
    try:
        msgspec.convert({name: value}, DefaultSampling)
    except msgspec.ValidationError as error:
        _LOG.warning("generation_config.json: %s=%s is ignored: %s", name, value, error)
        return None
    return value


def read_tokenizer_config(model_dir: Path) -> TokenizerConfig:
    """Read tokenizer_config.json; an absent file gives the defaults. Raises LoadFailed if it cannot be read."""
    path = model_dir / "tokenizer_config.json"
    if not path.exists():
        return TokenizerConfig()
    try:
        return msgspec.json.decode(path.read_bytes(), type=TokenizerConfig, strict=False)
    except (msgspec.MsgspecError, OSError, UnicodeError) as error:
        raise LoadFailed(f"{path} cannot be read: {error}") from error


def read_generation_config(model_dir: Path) -> GenerationConfig:
    path = model_dir / "generation_config.json"
    if not path.exists():
        return GenerationConfig()
    try:
        return msgspec.json.decode(path.read_bytes(), type=GenerationConfig, strict=False)
    except (msgspec.MsgspecError, OSError, UnicodeError) as error:
        raise LoadFailed(f"{path} cannot be read: {error}") from error


def read_chat_templates(model_dir: Path, config: TokenizerConfig) -> dict[str, str]:
    """Return the templates by name. Template files replace those in tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    if isinstance(config.chat_template, str):
        templates["default"] = config.chat_template
    elif config.chat_template:
        templates = {entry.name: entry.template for entry in config.chat_template}
    single = model_dir / "chat_template.jinja"
    more = model_dir / "additional_chat_templates"
    try:
        if single.exists():
            templates = {"default": single.read_text(encoding="utf-8")}
        if more.is_dir():
            templates |= {path.stem: path.read_text(encoding="utf-8") for path in sorted(more.glob("*.jinja"))}
    except (OSError, UnicodeError) as error:
        raise LoadFailed(f"a chat template of {model_dir} cannot be read: {error}") from error
    return templates
