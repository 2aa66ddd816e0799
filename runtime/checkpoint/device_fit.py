"""Computes whether a model fits a device budget, and how long a context its KV cache holds there.

A load and a prediction of one (`fit`) both decide by it: the load from the model's real layout, the prediction from sizes.
"""

from dataclasses import dataclass

MIN_KV_TOKENS = 256
"""A model that cannot hold this many tokens, or its whole context if that is shorter, beside its weights is not loaded."""


@dataclass(frozen=True, slots=True)
class DeviceBudget:
    """`total_slabs` slabs of `slab_bytes`, on each device that shares a model."""

    total_slabs: int
    slab_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.total_slabs * self.slab_bytes


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """The slabs and blocks of one model.

    Attributes:
        blocks_per_slab: KV blocks of `block_tokens` tokens that a slab holds.
        max_kv_slabs: slabs that its KV cache can address; None = any number.
    """

    weight_slabs: int
    blocks_per_slab: int
    block_tokens: int
    max_kv_slabs: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceFit:
    """`max_model_len` is the context in tokens, at most the one that was wanted. `refusal` says why the model does not fit; empty if it does."""

    max_model_len: int
    refusal: str = ""


def layout_of(weight_bytes: int, kv_bytes_per_token: int, block_tokens: int, slab_bytes: int) -> ModelLayout:
    """Return the layout of a model of these sizes."""
    return ModelLayout(
        _slabs(weight_bytes, slab_bytes), slab_bytes // (block_tokens * kv_bytes_per_token), block_tokens
    )


def fit_device(budget: DeviceBudget, layout: ModelLayout, wanted_tokens: int) -> DeviceFit:
    """Return the context of at most `wanted_tokens` that the KV cache can hold beside the weights, alone on the device."""
    if layout.blocks_per_slab < 1:
        return DeviceFit(0, f"one KV block of {layout.block_tokens} tokens exceeds a slab of {budget.slab_bytes} bytes")
    kv_slabs = max(0, budget.total_slabs - layout.weight_slabs)
    if layout.max_kv_slabs is not None:
        kv_slabs = min(kv_slabs, layout.max_kv_slabs)
    held_tokens = kv_slabs * layout.blocks_per_slab * layout.block_tokens
    least_blocks = _slabs(min(MIN_KV_TOKENS, wanted_tokens), layout.block_tokens)
    if held_tokens < least_blocks * layout.block_tokens:
        kv_bytes = _slabs(least_blocks, layout.blocks_per_slab) * budget.slab_bytes
        return DeviceFit(
            0,
            f"weights of {layout.weight_slabs * budget.slab_bytes} bytes and KV of {kv_bytes} bytes for "
            f"{least_blocks * layout.block_tokens} tokens exceed the device budget of {budget.size_bytes} bytes",
        )
    return DeviceFit(min(wanted_tokens, held_tokens))


def fit_adapter(budget: DeviceBudget, size_bytes: int, base: ModelLayout, wanted_tokens: int) -> DeviceFit:
    """Return the context of at most `wanted_tokens` that fits beside a LoRA adapter of this size and its base, alone on the device."""
    # An adapter may begin within a slab, so it touches one more than its size has.
    adapter_slabs = _slabs(size_bytes, budget.slab_bytes) + 1
    kv_slabs = budget.total_slabs - base.weight_slabs - adapter_slabs
    if kv_slabs < 1:
        return DeviceFit(
            0,
            f"its {size_bytes} bytes, the {base.weight_slabs * budget.slab_bytes} bytes of its base and a slab of KV exceed the device budget "
            f"of {budget.size_bytes} bytes",
        )
    return DeviceFit(min(wanted_tokens, kv_slabs * base.blocks_per_slab * base.block_tokens))


def cut_text(max_model_len: int, wanted_tokens: int) -> str:
    """Return the note on a context that was cut to what the budget holds; empty if it was not."""
    if max_model_len >= wanted_tokens:
        return ""
    return (
        f"its context is {max_model_len} instead of {wanted_tokens} tokens, because the device budget holds no more KV beside its weights; "
        "give more memory, quantise it, or register it with a smaller max_model_len"
    )


def _slabs(amount: int, unit: int) -> int:
    return -(-amount // unit)
