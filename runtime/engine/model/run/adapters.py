"""Passes a step's adapters to the linear layers of a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.engine.kernels.activation import Activation
from runtime.engine.kernels.adapters import AdapterTable, Chunks, add_adapters, add_adapters_gated
from runtime.engine.kernels.scratch import Scratch
from runtime.errors import EngineFault

if TYPE_CHECKING:
    from runtime.engine.kernels.gpu.adapters import Shrunk


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """The modules behind one matrix product, as adapters number them: `first_module` and those after it, with their numbers of outputs."""

    first_module: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Beside:
    """Where adapters' work runs beside the base's own products in a CUDA graph: a stream, and memory that no product uses."""

    stream: "torch.cuda.Stream"
    scratch: Scratch

    @staticmethod
    def create(device: torch.device) -> "Beside":
        return Beside(
            torch.cuda.Stream(device), Scratch.allocate(device, partial_elements=1 << 22, num_counters=1 << 10)
        )


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of a step in which at least one row has one.

    Attributes:
        chunks: the tokens grouped by adapter.
        num_tokens: of the step, padding included.
        beside: where work may run beside the base's own products in a CUDA graph; None on a CPU.
        of_samples: the same for the tokens whose logits are computed, once all others are dropped; None = none may be dropped.
    """

    chunks: Chunks
    table: AdapterTable
    num_tokens: int
    beside: Beside | None = None
    of_samples: "StepAdapters | None" = None

    def around(self, site: AdapterSite, x: Tensor, product: Callable[[], Tensor], scratch: Scratch | None) -> Tensor:
        """Return the base's own `product` of `x` [T, K] with the adapters' added.

        In a graph, half of the adapters' work runs beside the product. Without a graph, the events for that would take the host longer than it saves.
        """
        self._check(x)
        if self.beside is None or not torch.cuda.is_current_stream_capturing():
            y = product()
            add_adapters(
                y, x, self.chunks, self.table, first_module=site.first_module, widths=site.widths, scratch=scratch
            )
            return y
        from runtime.engine.kernels.gpu import adapters

        y, shrunk = self._beside(self.beside, site, x, product)
        adapters.expand(y, shrunk, self.chunks, self.table, site.first_module, site.widths)
        return y

    def around_gated(
        self,
        site: AdapterSite,
        x: Tensor,
        product: Callable[[], Tensor],
        activation: Activation,
        scratch: Scratch | None,
    ) -> Tensor:
        """Return act(gate) × up, where gate and up are the base's own `product` of `x` [T, K] with the adapters' added."""
        self._check(x)
        if self.beside is None or not torch.cuda.is_current_stream_capturing():
            return add_adapters_gated(
                product(),
                x,
                self.chunks,
                self.table,
                activation,
                first_module=site.first_module,
                widths=site.widths,
                scratch=scratch,
            )
        from runtime.engine.kernels.gpu import adapters

        y, shrunk = self._beside(self.beside, site, x, product)
        return adapters.expand_gated(y, shrunk, self.chunks, self.table, activation, site.first_module, site.widths)

    def _beside(
        self, beside: Beside, site: AdapterSite, x: Tensor, product: Callable[[], Tensor]
    ) -> "tuple[Tensor, Shrunk]":
        """Return the base's own product and the shrunk `x`, which was computed `beside` it."""
        from runtime.engine.kernels.gpu import adapters

        main = torch.cuda.current_stream(x.device)
        beside.stream.wait_stream(main)
        with torch.cuda.stream(beside.stream):
            shrunk = adapters.shrink(x, self.chunks, self.table, site.first_module, len(site.widths), beside.scratch)
        y = product()
        main.wait_stream(beside.stream)
        return y, shrunk

    def _check(self, x: Tensor) -> None:
        if x.shape[0] != self.num_tokens:
            raise EngineFault(f"a linear layer saw {x.shape[0]} of the step's {self.num_tokens} tokens")


class StepPort:
    """Carries a step's adapters to the linear layers inside Hugging Face's own code, whose calls have no argument for them."""

    def __init__(self) -> None:
        self.adapters: StepAdapters | None = None
