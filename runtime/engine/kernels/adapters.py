"""Adds LoRA adapters to the output of a linear layer: y += B · A · x, each token with its own adapter or none.

The step's upload groups tokens by adapter: chunks of at most `chunk_tokens` tokens of one adapter, over an order of the tokens (kernels/inputs.py).
A table on the device says where each adapter's matrices lie, so that one CUDA graph serves any mixture of adapters. A launch covers the modules
behind one matrix product (q, k and v; gate and up): each has an A of its own, and their outputs lie end to end. Scaling is part of B.

On a GPU a shrink (h = A · x) and an expand (y += B · h) run one after the other. Few tokens leave a GPU idle, so the shrink splits the columns of x,
and the expand adds the parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.inputs import AT_CHUNKS, AT_ORDER, NUM_CHUNKS
from runtime.engine.kernels.scratch import Scratch

MAX_MODULES = 3  # of one launch
FEW_TOKENS = 256  # up to here chunks are small; a bound between the sizes of CUDA graphs
_SMALL_CHUNK, _LARGE_CHUNK = 16, 64


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """The adapters of one base on the device.

    Attributes:
        memory: 1-D, in the base's type: all matrices, A [rank, K] and B [N, rank] row by row.
        places: [slots, modules, 3] int64: the elements of `memory` at which A and B begin, and the rank; rank 0 = the adapter leaves the module alone.
        max_rank: no rank is larger.
    """

    memory: Tensor
    places: Tensor
    max_rank: int

    @property
    def num_slots(self) -> int:
        return self.places.shape[0]


def chunk_tokens(num_tokens: int, *, on_gpu: bool) -> int:
    """Return the largest number of tokens of a chunk, for a step of `num_tokens` tokens. A CPU takes all tokens of an adapter at once."""
    if not on_gpu:
        return max(num_tokens, 1)
    return _SMALL_CHUNK if num_tokens <= FEW_TOKENS else _LARGE_CHUNK


def max_chunks(num_tokens: int, num_slots: int, *, on_gpu: bool) -> int:
    """Return a bound of the chunks of any step of at most `num_tokens` tokens."""
    return min(num_tokens, -(-num_tokens // chunk_tokens(num_tokens, on_gpu=on_gpu)) + num_slots)


def add_adapters(
    y: Tensor,
    x: Tensor,
    upload: Tensor,
    table: AdapterTable,
    *,
    first_module: int,
    widths: Sequence[int],
    num_chunks: int,
    scratch: Scratch | None = None,
) -> None:
    """Add the adapters' products of `x` [T, K] to `y` [T, sum(widths)] in place.

    The modules are `first_module` and those after it, one for each of `widths`, their numbers of outputs. `num_chunks`: at least the chunks of the
    upload. Tokens in no chunk are left alone.
    """
    if y.is_cuda:
        from runtime.engine.kernels.gpu import adapters

        adapters.add_adapters(y, x, upload, table, first_module, widths, num_chunks, scratch)
    else:
        add_adapters_torch(y, x, upload, table, first_module, widths)


def add_adapters_torch(
    y: Tensor, x: Tensor, upload: Tensor, table: AdapterTable, first_module: int, widths: Sequence[int]
) -> None:
    """Torch twin of the Triton launches, and the path of a CPU."""
    num_chunks, at_chunks, at_order = (int(upload[word]) for word in (NUM_CHUNKS, AT_CHUNKS, AT_ORDER))
    places = table.places[:, first_module : first_module + len(widths)].tolist()
    in_features = x.shape[1]
    for slot, first, count in upload[at_chunks : at_chunks + 3 * num_chunks].view(-1, 3).tolist():
        tokens = upload[at_order + first : at_order + first + count].long()
        rows = x[tokens]
        column = 0
        for width, (a_at, b_at, rank) in zip(widths, places[slot], strict=True):
            if rank:
                a = table.memory[a_at : a_at + rank * in_features].view(rank, in_features)
                b = table.memory[b_at : b_at + width * rank].view(width, rank)
                hidden = functional.linear(rows.float(), a.float()).to(x.dtype)
                added = functional.linear(hidden.float(), b.float())
                part = y[:, column : column + width]
                part.index_copy_(0, tokens, (part[tokens].float() + added).to(y.dtype))
            column += width


def zero_upload(device: torch.device) -> Tensor:
    """Return an upload without chunks, over which launches do nothing."""
    return torch.zeros(16, dtype=torch.int32, device=device)
