"""Divides a decoder among the ranks of a tensor-parallel group.

Each rank has some of the attention heads and of the MLP's inner channels. q, k, v, gate and up are divided by their outputs, and o and down by their
inputs, so that the sums of all ranks' outputs of o and down are the layer's. The output projection is divided by tokens of the vocabulary, and the
sum of all ranks' logits, each 0 where another rank has the token, are the model's. Embeddings and norms are on every rank.
"""

import copy
from dataclasses import dataclass
from typing import Any

from runtime.errors import LoadFailed


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a group of `size`."""

    rank: int = 0
    size: int = 1

    def part_of(self, full: int, local: int) -> tuple[int, int]:
        """Return (start, length) of this rank's part of `full` channels. Ranks share a part if there are fewer parts than ranks."""
        num_parts = full // local
        return self.rank * num_parts // self.size * local, local

    def slice_of(self, full: int) -> tuple[int, int]:
        """Return (start, length) of this rank's part of `full` rows, which need not divide evenly."""
        start = self.rank * full // self.size
        return start, (self.rank + 1) * full // self.size - start


WHOLE = Shard()


def shard_config(config: Any, shard: Shard) -> Any:
    """Return a copy of transformers' `config` with one rank's numbers. Raises LoadFailed naming the number that does not divide."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    inner = getattr(config, "intermediate_size", None)
    if not isinstance(inner, int):
        raise LoadFailed(f"{type(config).__name__} has no intermediate_size, so it cannot be divided among devices")
    _check_divides("attention heads", heads, shard)
    _check_divides("channels in its MLP", inner, shard)
    if kv_heads % shard.size and shard.size % kv_heads:
        raise LoadFailed(f"it has {kv_heads} KV heads, which {shard.size} devices can neither divide nor share evenly")
    local = copy.deepcopy(config)
    local.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    local.num_attention_heads = heads // shard.size
    local.num_key_value_heads = max(1, kv_heads // shard.size)
    local.intermediate_size = inner // shard.size
    return local


def _check_divides(what: str, count: int, shard: Shard) -> None:
    if count % shard.size:
        raise LoadFailed(f"it has {count} {what}, which {shard.size} devices cannot divide evenly")
