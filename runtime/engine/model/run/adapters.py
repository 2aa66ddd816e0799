"""Passes a step's adapters to the linear layers of a forward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.engine.kernels.adapters import AdapterTable, add_adapters
from runtime.engine.kernels.scratch import Scratch
from runtime.errors import EngineFault


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """The modules behind one matrix product, as adapters number them: `first_module` and those after it, with their numbers of outputs."""

    first_module: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepAdapters:
    """The adapters of a step in which at least one row has one.

    Attributes:
        upload: the step's words, with the chunks (kernels/inputs.py).
        num_tokens: of the step, padding included.
        num_chunks: at least as many as the upload has.
        beside: a stream for what may run beside the base's own products in a CUDA graph; None on a CPU.
    """

    upload: Tensor
    table: AdapterTable
    num_tokens: int
    num_chunks: int
    beside: "torch.cuda.Stream | None" = None

    def around(self, site: AdapterSite, x: Tensor, product: Callable[[], Tensor], scratch: Scratch | None) -> Tensor:
        """Return the base's own `product` of `x` [T, K] with the adapters' added.

        In a graph, half of the adapters' work runs beside the product. Without a graph, the events for that would take the host longer than it saves.
        """
        if self.beside is None or not torch.cuda.is_current_stream_capturing():
            y = product()
            self.add(site, x, y, scratch)
            return y
        from runtime.engine.kernels.gpu import adapters

        self._check(x)
        main = torch.cuda.current_stream(x.device)
        self.beside.wait_stream(main)
        with torch.cuda.stream(self.beside):  # without the scratch, which the product uses
            shrunk = adapters.shrink(x, self.upload, self.table, site.first_module, len(site.widths), self.num_chunks)
        y = product()
        main.wait_stream(self.beside)
        adapters.expand(y, shrunk, self.upload, self.table, site.first_module, site.widths, self.num_chunks)
        return y

    def add(self, site: AdapterSite, x: Tensor, y: Tensor, scratch: Scratch | None) -> None:
        """Add the adapters' products of `x` [T, K] to `y` [T, N], the base's own output."""
        self._check(x)
        add_adapters(
            y,
            x,
            self.upload,
            self.table,
            first_module=site.first_module,
            widths=site.widths,
            num_chunks=self.num_chunks,
            scratch=scratch,
        )

    def _check(self, x: Tensor) -> None:
        if x.shape[0] != self.num_tokens:
            raise EngineFault(f"a linear layer saw {x.shape[0]} of the step's {self.num_tokens} tokens")


class StepPort:
    """Carries a step's adapters to the linear layers inside Hugging Face's own code, whose calls have no argument for them."""

    def __init__(self) -> None:
        self.adapters: StepAdapters | None = None
