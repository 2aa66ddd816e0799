"""The seam between a model that is divided among ranks and the operations that join what the ranks compute."""

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """What the ranks of a tensor-parallel group do together. Every rank must make the same calls in the same order."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks. May overwrite `tensor`. The result is valid until the next call."""

    def add_rms_norm(
        self, part: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """Add the sum of `part` over all ranks to `residual` in place, and normalise it, as kernels.norm does. Returns (normed, residual).

        May overwrite `part`. The residual must be contiguous.
        """

    def gather(self, part: Tensor, num_columns: int) -> Tensor:
        """Return rows of `num_columns` columns. `part` [rows, columns]: those of this rank, as `Shard.slice_of` divides them."""
