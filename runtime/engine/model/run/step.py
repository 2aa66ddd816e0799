"""Defines the interface between a model's forward pass and the runner: the inputs of one step as the layers see them.

The runner fills a StepContext before each forward pass, and attention reads it. All tensors are on the engine's device and keep their addresses,
because CUDA graphs hold these. A step that is smaller than the tensors is padded: padded tokens have slot -1, and padded rows have no tokens.

KV layout: a slab of a model's KV range is layer-major, `[layer][K | V][block][token in block][KV head][head dim]`.
A layer's K *plane* starts at its first block in slab 0 and extends to the end of the range. In every layer, block j of slab i starts
`page id * page_unit` elements into the plane, where page id = i * pages_per_slab + j * pages_per_block and
page_unit = slab bytes / pages_per_slab, in elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.engine.kernels.adapters import AdapterTable
from runtime.engine.kernels.scratch import Scratch
from runtime.engine.model.cpu.attention_plan import AttentionPlan
from runtime.engine.model.run.adapters import StepAdapters


@dataclass(frozen=True, slots=True)
class KvPlanes:
    """One layer's K and V planes: 1-D tensors of the KV dtype over the model's KV range (unmapped parts must not be accessed)."""

    k: torch.Tensor
    v: torch.Tensor
    page_unit: int  # elements


@dataclass(slots=True)
class StepContext:
    """One step: T tokens of B rows, without padding between rows.

    Attributes:
        planes: one entry per layer that has KV.
        page_table: [max_rows, W] int32; row slot → page ids.
        row_slots: [B] int32.
        query_starts: [B + 1] int32; row b's tokens are query_starts[b] … query_starts[b + 1].
        context_lens: [B] int32; tokens in the row after this step.
        slots: [T] int64; element offset of each token's K (V) in the plane, -1 = padding.
        block_tokens: tokens in a block.
        max_query_len, max_context_len: upper bounds known to the host. They select kernels and never change results.
        scratch: workspace of the attention and linear kernels (GPU).
        each_samples: logits are computed for every token, in order.
        num_hidden: the last `num_hidden` tokens of `logits_at` get no logits: the forward pass must set `hidden` to their last hidden states.
        hidden: [num_hidden, hidden size], after the final norm.
        adapters: the LoRA adapters of the step's rows; None = no row has one.
        host: the CPU attention's plan for this step. The first layer creates it and the others read it.
    """

    planes: Sequence[KvPlanes]
    page_table: torch.Tensor
    row_slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    slots: torch.Tensor
    block_tokens: int
    max_query_len: int
    max_context_len: int
    scratch: Scratch | None = None
    host: AttentionPlan | None = None
    each_samples: bool = False
    num_hidden: int = 0
    hidden: torch.Tensor | None = None
    adapters: StepAdapters | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The constants of one layer's attention."""

    layer: int  # index into StepContext.planes
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int = 0  # visible tokens, including the query's own; 0 = all
    softcap: float = 0.0  # 0 = none


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How fused attention rotates and normalises qkv before it writes K and V."""

    rotary_dim: int
    interleaved: bool = False  # pairs (0,1),(2,3)… instead of halves
    norm_eps: float = 0.0  # of the per-head QK norm, if there is one
    norm_plus_one: bool = False  # Gemma's (1 + weight)


class CausalForward(Protocol):
    """A causal language model's forward pass over packed tokens.

    input_ids, positions: [T] int64. logits_at: [S + step.num_hidden] int64, indices of the tokens whose logits are computed, then of those whose
    hidden states are kept. Returns logits [S, vocab] in the model's dtype
    (softcap and scale of the logits applied).
    """

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_at: torch.Tensor, step: StepContext
    ) -> torch.Tensor: ...


@dataclass(slots=True)
class BuiltModel:
    """A model that is ready to run once its weights are loaded. Building returns it, and the runner uses it."""

    forward: CausalForward
    planes: Sequence[KvPlanes]
    block_tokens: int
    vocab_size: int
    max_model_len: int
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    path: str  # "fused: …" or "unfused: …"
    token_stride: (
        int  # elements between the K (V) of two tokens of a block: KV heads × head dim, the same in every layer
    )
    adapters: AdapterTable | None = None  # None = the forward pass takes no adapters
