"""Reads the scaling of rotary embeddings from a GGUF file, as transformers' rope parameters."""

import math
from collections.abc import Sequence
from typing import Any

from runtime.errors import LoadFailed
from runtime.puller.gguf_index import GgufIndex

# Llama 3.1 and later; a file holds the frequencies' divisors that follow from them.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_TOKENS = 1.0, 4.0, 8192
_KNOWN = {
    "none": {"type"},
    "linear": {"type", "factor", "original_context_length"},
    "yarn": {"type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow"},
}


def scaled_rope(
    index: GgufIndex, parameters: dict[str, Any], head_dim: int, divisors: Sequence[float] | None
) -> dict[str, Any]:
    """Return `parameters` with the scaling that the file states.

    `divisors` are the values of the tensor rope_freqs.weight, one per frequency, or None. Raises LoadFailed for a scaling that is not supported.
    """
    prefix = f"{index.architecture}.rope."
    scaling = {
        key.removeprefix(f"{prefix}scaling."): value
        for key, value in index.metadata.items()
        if key.startswith(f"{prefix}scaling.") and not key.endswith(".finetuned")
    }
    linear = index.metadata.get(f"{prefix}scale_linear")
    if linear is not None and linear != 1:
        scaling |= {"type": "linear", "factor": linear}
    kind = scaling.get("type", "linear" if "factor" in scaling else "none")
    factor = scaling.get("factor", 1.0)
    if kind not in _KNOWN or not scaling.keys() <= _KNOWN[kind] or not isinstance(factor, int | float) or factor <= 0:
        raise LoadFailed(
            f"the GGUF file scales its rotary embeddings in a way that is not supported ({prefix}scaling: {scaling}); "
            "use the safetensors version of this model"
        )
    if divisors is not None:
        if kind != "none":
            raise LoadFailed(f"the GGUF file has both rope_freqs.weight and {prefix}scaling.type = {kind!r}")
        return {**parameters, **_llama3(divisors, float(parameters["rope_theta"]), head_dim)}
    if kind == "none" or factor == 1:
        return parameters
    scaled = {**parameters, "rope_type": kind, "factor": float(factor)}
    if kind == "linear":
        return scaled
    if scaling.get("attn_factor", 1.0) != 1.0:
        raise LoadFailed(
            f"the GGUF file sets {prefix}scaling.attn_factor = {scaling['attn_factor']}, which is not supported"
        )
    original = scaling.get("original_context_length")
    if not isinstance(original, int):
        raise LoadFailed(
            f"the GGUF file has {prefix}scaling.type = 'yarn' without {prefix}scaling.original_context_length"
        )
    names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    betas = {name: scaling[key] for key, name in names.items() if key in scaling}
    return {**scaled, "original_max_position_embeddings": original, **betas}


def _llama3(divisors: Sequence[float], theta: float, head_dim: int) -> dict[str, Any]:
    factor = max(divisors)
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _ORIGINAL_TOKENS,
    }
    expected = [_divisor(2 * math.pi * theta ** (2 * i / head_dim), factor) for i in range(head_dim // 2)]
    if len(expected) != len(divisors) or any(
        not math.isclose(ours, theirs, rel_tol=1e-3) for ours, theirs in zip(expected, divisors, strict=True)
    ):
        raise LoadFailed(
            "the GGUF file's tensor rope_freqs.weight is not Llama 3.1's scaling of rotary embeddings, the only one that is supported; "
            "use the safetensors version of this model"
        )
    return parameters


def _divisor(wavelength: float, factor: float) -> float:
    if wavelength < _ORIGINAL_TOKENS / _HIGH_FREQ_FACTOR:
        return 1.0
    if wavelength > _ORIGINAL_TOKENS / _LOW_FREQ_FACTOR:
        return factor
    smooth = (_ORIGINAL_TOKENS / wavelength - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    return 1 / ((1 - smooth) / factor + smooth)
