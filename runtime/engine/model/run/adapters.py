"""How a step's adapters reach the linear layers of a forward pass."""

from dataclasses import dataclass

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
    """

    upload: Tensor
    table: AdapterTable
    num_tokens: int
    num_chunks: int

    def add(self, site: AdapterSite, x: Tensor, y: Tensor, scratch: Scratch | None) -> None:
        """Add the adapters' products of `x` [T, K] to `y` [T, N], the base's own output."""
        if x.shape[0] != self.num_tokens:
            raise EngineFault(f"a linear layer saw {x.shape[0]} of the step's {self.num_tokens} tokens")
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


class StepPort:
    """Carries a step's adapters to the linear layers inside Hugging Face's own code, whose calls have no argument for them."""

    def __init__(self) -> None:
        self.adapters: StepAdapters | None = None
