"""Reads a checkpoint's configuration before any weight: the model class, its limits and end tokens, and why a model is not supported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from runtime.checkpoint.end_tokens import end_token_ids
from runtime.errors import LoadFailed
from runtime.types import Checkpoint

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The configuration of a supported model. `config` is transformers' object and `model_class` its …ForCausalLM."""

    model_id: str
    config: Any
    model_class: Any
    dtype: torch.dtype
    num_layers: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]

    @property
    def architecture(self) -> str:
        return str(self.model_class.__name__)


def read_card(model_id: str, checkpoint: Checkpoint, max_model_len: int | None) -> ModelConfig:
    """Raises LoadFailed naming what is missing, unsupported or out of bounds."""
    if checkpoint.dtype not in _DTYPES:
        raise LoadFailed(f"dtype {checkpoint.dtype} is not one of {', '.join(_DTYPES)}", model=model_id)
    try:
        return _read(model_id, checkpoint, max_model_len)
    except LoadFailed:
        raise
    except Exception as error:  # what a configuration of foreign make may lead transformers to raise
        raise LoadFailed(
            f"config.json cannot be used: {' '.join(str(error).split()) or type(error).__name__}", model=model_id
        ) from error


def _read(model_id: str, checkpoint: Checkpoint, max_model_len: int | None) -> ModelConfig:
    config = AutoConfig.from_pretrained(checkpoint.model_dir, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LoadFailed(f"{type(config).__name__} is not a causal language model", model=model_id)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if reason := _unsupported(config, model_class):
        raise LoadFailed(f"{model_class.__name__} is not supported: {reason}", model=model_id)
    return ModelConfig(
        model_id=model_id,
        config=config,
        model_class=model_class,
        dtype=_DTYPES[checkpoint.dtype],
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        max_model_len=_context_limit(model_id, config, max_model_len),
        eos_token_ids=end_token_ids(
            Path(checkpoint.model_dir), getattr(config, "eos_token_id", None), int(config.vocab_size)
        ),
    )


def check_sizes(card: ModelConfig, num_tensors: int) -> None:
    """Before the module is built: layers that the files cannot hold would take all time and memory. Raises LoadFailed."""
    if card.num_layers < 1 or card.vocab_size < 1:
        raise LoadFailed(f"config.json says {card.num_layers} layers and a vocabulary of {card.vocab_size}")
    if card.num_layers > num_tensors:
        raise LoadFailed(f"config.json says {card.num_layers} layers, the files hold {num_tensors} tensors")


def _unsupported(config: Any, model_class: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    if getattr(config, "auto_map", None) and model_class.__module__.split(".")[0] != "transformers":
        return "it brings its own code"
    if getattr(model_class, "_is_stateful", False):
        return "it keeps a recurrent state, which is not paged"
    if not getattr(model_class, "_supports_attention_backend", False):
        return "its code has no attention hook"
    if getattr(config, "text_config", None) is not None and config.get_text_config() is not config:
        return "it is a multimodal model; only text models run here"
    kinds = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised in a format that was not converted"
    return None


def longrope_limit(rope_parameters: object) -> int | None:
    """Return the tokens up to which a LongRoPE model runs with its short frequencies, None for any other scheme."""
    if not isinstance(rope_parameters, dict):
        return None
    if rope_parameters.get("rope_type") == "longrope":
        return int(rope_parameters["original_max_position_embeddings"])
    limits = [limit for nested in rope_parameters.values() if (limit := longrope_limit(nested)) is not None]
    return min(limits) if limits else None


def _context_limit(model_id: str, config: Any, asked: int | None) -> int:
    """Tokens of a sequence. LongRoPE models keep to their original length unless more is asked for: their short and long frequencies do not mix."""
    limit = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0)
    if limit <= 0:
        if asked is None:
            raise LoadFailed("config.json has no context limit, and max_model_len is not set", model=model_id)
        return asked
    if asked is None:
        return min(limit, longrope_limit(getattr(config, "rope_parameters", None)) or limit)
    if not 0 < asked <= limit:
        raise LoadFailed(f"max_model_len {asked} is not within the checkpoint's {limit} tokens", model=model_id)
    return asked
