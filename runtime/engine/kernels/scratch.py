"""Device memory that kernels may overwrite between launches: partial sums, arrival counters, and a staging area for
dequantised operands.

One `Scratch` serves every launch of one stream. Its contents are meaningless after a launch, except that the counters
are zero: the last program to arrive resets them.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scratch:
    """`partials` is float32, `counters` int32 zeros, `staging` uint8 for a dequantised weight. `staging` may be empty."""

    partials: torch.Tensor
    counters: torch.Tensor
    staging: torch.Tensor

    @staticmethod
    def allocate(
        device: torch.device | str,
        *,
        partial_elements: int = 1 << 23,
        num_counters: int = 1 << 14,
        staging_bytes: int = 0,
    ) -> "Scratch":
        """Allocate the memory ahead of any launch. The default holds 32 MiB of partial sums."""
        return Scratch(
            partials=torch.empty(partial_elements, dtype=torch.float32, device=device),
            counters=torch.zeros(num_counters, dtype=torch.int32, device=device),
            staging=torch.empty(staging_bytes, dtype=torch.uint8, device=device),
        )

    def holds(self, partial_elements: int, num_counters: int) -> bool:
        """Return whether a launch that needs these amounts may use this memory."""
        return self.partials.numel() >= partial_elements and self.counters.numel() >= num_counters
