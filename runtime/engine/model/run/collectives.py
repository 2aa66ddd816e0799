"""The seam between a model that is divided among ranks and the operations that join what the ranks compute."""

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """What the ranks of a tensor-parallel group do together. Every rank must make the same calls in the same order."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks. May overwrite `tensor`. The result is valid until the next call."""

    def gather(self, part: Tensor, num_columns: int) -> Tensor:
        """Return rows of `num_columns` columns. `part` [rows, columns]: those of this rank, as `Shard.slice_of` divides them."""
