"""Holds one model's tokenizer, detokenizers, chat templates and default sampling parameters."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from common.model_key import DefaultSampling, ModelSettings
from runtime.text.chat import ChatMessage, ChatOptions, ChatTemplates
from runtime.text.checkpoint_format import format_of
from runtime.text.detokenizer import Detokenizer
from runtime.text.embedding import Embedding, read_embedding
from runtime.text.response_template import ResponseTemplate, read_response_template
from runtime.text.tokenizer import Encoding, TextTokenizer, open_tokenizer
from runtime.text.tokenizer_files import read_chat_templates, read_generation_config, read_tokenizer_config

_T = TypeVar("_T", int, float)


class TextModel:
    """Converts between text and token ids. Immutable, and safe to use from several threads."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        templates: ChatTemplates,
        sampling: DefaultSampling,
        embedding: Embedding | None = None,
        response_template: ResponseTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._response_template = response_template
        # In a pattern, the marks of special tokens are escaped.
        pattern = "" if response_template is None else response_template.text.replace("\\", "")
        self.output_format = format_of(
            templates.output_format, response_template, tokenizer.special_tokens_in(pattern) if pattern else frozenset()
        )
        self._with_markers = tokenizer.showing(self.output_format.markers) if self.output_format else tokenizer
        self._templates = templates
        self.sampling = sampling  # the registration's values, then generation_config.json's
        self.embedding = embedding  # None = not an embedding model
        self.vocab_size = tokenizer.vocab_size
        self.most_chars_per_token = tokenizer.most_chars_per_token

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_with_offsets(self, text: str) -> Encoding:
        return self._tokenizer.encode_with_offsets(text)

    def render_chat(self, model: str, messages: Sequence[ChatMessage], options: ChatOptions) -> str:
        """Return the prompt's text. Encode it without adding special tokens, since templates write them. Errors carry the name `model`."""
        return self._templates.render(model, messages, options)

    def template_reads(self, model: str, template: str | None, variable: str) -> bool:
        """Whether the model's template, or its template of a name, names a variable. Errors carry the name `model`."""
        return self._templates.reads(model, template, variable)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, show_markers: bool = False
    ) -> Detokenizer:
        """Return a detokenizer for the tokens after `prompt`. `show_markers`: it shows the special tokens that `output_format` has."""
        tokenizer = self._with_markers if show_markers else self._tokenizer
        return tokenizer.detokenizer(prompt, skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int) -> str:
        return self._tokenizer.piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def special_tokens(self, texts: Sequence[str]) -> dict[int, str]:
        """Return those of `texts` that are special tokens, by id."""
        ids = [(self._tokenizer.token_id(text), text) for text in texts]
        return {
            token_id: text for token_id, text in ids if token_id is not None and self._tokenizer.is_special(token_id)
        }

    def marker_ids(self, texts: Iterable[str]) -> dict[str, int]:
        """Return those of `texts` that are tokens of their own, special or not, which grammars must name by id."""
        ids = {text: self._tokenizer.marker_id(text) for text in texts}
        return {text: token_id for text, token_id in ids.items() if token_id is not None}

    def is_special(self, token_id: int) -> bool:
        return self._tokenizer.is_special(token_id)

    def adapted(self, model_dir: Path, settings: ModelSettings) -> "TextModel":
        """Return the text model of an adapter of this model: the same tokenizer, with the adapter's chat template and defaults if it has any.

        Raises LoadFailed naming the file that is broken.
        """
        config = read_tokenizer_config(model_dir)
        texts = read_chat_templates(model_dir, config)
        if settings.chat_template is not None:
            texts = {"default": settings.chat_template}
        templates = self._templates.replaced(texts) if texts else self._templates
        own = read_response_template(config.response_template)
        return TextModel(
            self._tokenizer,
            templates,
            _merge(settings.sampling, self.sampling),
            response_template=own or self._response_template,
        )


def load_text(model_dir: Path, settings: ModelSettings) -> TextModel:
    """Read a checkpoint's tokenizer and template files. It takes tens of milliseconds to a second: call it off the event loop.

    Raises LoadFailed naming the file that is missing or broken.
    """
    config = read_tokenizer_config(model_dir)
    templates = read_chat_templates(model_dir, config)
    if settings.chat_template is not None:
        templates = {"default": settings.chat_template}
    return TextModel(
        open_tokenizer(model_dir, config),
        ChatTemplates(templates, config.named_tokens()),
        _merge(settings.sampling, read_generation_config(model_dir).sampling()),
        read_embedding(model_dir),
        read_response_template(config.response_template),
    )


def _merge(first: DefaultSampling, second: DefaultSampling) -> DefaultSampling:
    def pick(mine: _T | None, other: _T | None) -> _T | None:
        return other if mine is None else mine

    return DefaultSampling(
        temperature=pick(first.temperature, second.temperature),
        top_k=pick(first.top_k, second.top_k),
        top_p=pick(first.top_p, second.top_p),
        min_p=pick(first.min_p, second.min_p),
        repetition_penalty=pick(first.repetition_penalty, second.repetition_penalty),
        max_tokens=pick(first.max_tokens, second.max_tokens),
    )
