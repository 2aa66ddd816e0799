"""Reads the adapter_config.json of a PEFT LoRA adapter.

Every option that changes the base model or the forward pass in a way that is not computed here is refused by name. Options of the training alone
(dropout, target patterns, layers) are ignored: the tensors show what they led to.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import LoadFailed
from runtime.puller.checkpoint_check import read_json
from runtime.puller.source import ADAPTER_CONFIG

# They say how the adapter was trained or where it came from. The tensors hold the result.
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})  # fmt: skip
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights",
})  # fmt: skip
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales the base weights; merge the adapter into its base and register the result as a model",
    "lora_bias": "a bias beside the low-rank matrices is not computed; train without lora_bias",
    "modules_to_save": "it replaces whole modules of the base; merge it into its base and register the result as a model",
    "trainable_token_indices": "it changes token embeddings; merge it into its base and register the result as a model",
    "layer_replication": "it repeats layers of the base; merge it into its base and register the result as a model",
    "alora_invocation_tokens": "an activated LoRA depends on the position of its invocation tokens, which is not computed",
    "target_parameters": "it adapts parameters that are not linear layers",
    "use_qalora": "QALoRA pools the input by groups, which is not computed",
    "use_bdlora": "block-diagonal LoRA is not computed",
    "megatron_config": "Megatron's parallel layers are not computed",
    "arrow_config": "Arrow's routing between adapters is not computed",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA's sampling is not computed",
    "velora_config": "VeLoRA is not computed",
}
# These begin at a zero product, so the base weights of the training are the base's own.
_SOUND_INITS = frozenset({"gaussian", "eva", "orthogonal"})

_MAX_PATTERNS = 4096
_MAX_PATTERN_LENGTH = 512
_MAX_REPEATS = 2  # of a pattern: more could make a match take minutes
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The options that the tensors do not show. Patterns are compiled, in the file's order."""

    rank: int
    alpha: float
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    use_rslora: bool

    def rank_of(self, module: str) -> int:
        return int(_first(self.rank_patterns, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """Return the factor of B · A · x for a module: alpha / r, or alpha / √r with rank stabilisation."""
        alpha, rank = _first(self.alpha_patterns, module, self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read the file. Raises LoadFailed naming the option that is damaged or not supported."""
    return parse_adapter_config(read_json(path))


def parse_adapter_config(fields: Mapping[str, Any]) -> AdapterConfig:
    kind = str(fields.get("peft_type", ""))
    if kind.upper() != "LORA":
        raise LoadFailed(f"{ADAPTER_CONFIG} has peft_type {kind or 'missing'}; only LORA adapters are supported")
    for name, reason in _REFUSED.items():
        if fields.get(name):
            raise LoadFailed(f"{ADAPTER_CONFIG} sets {name}: {reason}")
    unknown = sorted(
        name for name, value in fields.items() if value and name not in _IGNORED | _READ and name not in _REFUSED
    )
    if unknown:
        raise LoadFailed(f"{ADAPTER_CONFIG} sets {unknown[0]}, which this version does not know and must not ignore")
    if (bias := fields.get("bias") or "none") != "none":
        raise LoadFailed(f"{ADAPTER_CONFIG} has bias {bias!r}: it changes the biases of the base; train with bias none")
    _check_init(fields.get("init_lora_weights", True))
    rank = _whole("r", fields.get("r"))
    return AdapterConfig(
        rank,
        _number("lora_alpha", fields.get("lora_alpha", rank)),
        tuple((_compiled("rank_pattern", key), _whole(f"rank_pattern.{key}", value)) for key, value in _patterns(fields, "rank_pattern")),
        tuple((_compiled("alpha_pattern", key), _number(f"alpha_pattern.{key}", value)) for key, value in _patterns(fields, "alpha_pattern")),
        bool(fields.get("use_rslora")),
    )  # fmt: skip


def _check_init(init: object) -> None:
    if isinstance(init, bool) or init is None or str(init).lower() in _SOUND_INITS:
        return
    raise LoadFailed(
        f"{ADAPTER_CONFIG} has init_lora_weights {str(init)[:40]!r}, which changed the base weights before the training; "
        "convert the adapter to a plain LoRA when saving it (path_initial_model_for_weight_conversion)"
    )


def _first(patterns: "tuple[tuple[re.Pattern[str], float], ...]", module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _patterns(fields: Mapping[str, Any], name: str) -> "list[tuple[str, Any]]":
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        raise LoadFailed(f"{ADAPTER_CONFIG}: {name} is {type(found).__name__}, not an object")
    if len(found) > _MAX_PATTERNS:
        raise LoadFailed(f"{ADAPTER_CONFIG}: {name} has {len(found)} entries, the limit is {_MAX_PATTERNS}")
    return list(found.items())


def _compiled(name: str, key: str) -> re.Pattern[str]:
    """Compile a pattern as PEFT matches it: against the end of a module's path, from a dot on."""
    repeats = len(re.findall(r"(?<!\\)[*+]", key))
    if len(key) > _MAX_PATTERN_LENGTH or repeats > _MAX_REPEATS or _REPEATED_GROUP.search(key) or "{" in key:
        raise LoadFailed(
            f"{ADAPTER_CONFIG}: {name} has the pattern {key[:60]!r}, which may take too long to match; "
            f"write it with at most {_MAX_REPEATS} of * and +, and none behind a group"
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise LoadFailed(
            f"{ADAPTER_CONFIG}: {name} has the pattern {key[:60]!r}, which is not valid: {error}"
        ) from error


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LoadFailed(f"{ADAPTER_CONFIG}: {name} is {str(value)[:40]!r}, not a whole number from 1 on")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LoadFailed(f"{ADAPTER_CONFIG}: {name} is {str(value)[:40]!r}, not a finite number")
    return float(value)
