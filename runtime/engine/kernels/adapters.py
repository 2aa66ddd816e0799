"""Adds LoRA adapters to the output of a linear layer: y += B · A · x, each token with its own adapter or none.

The step's upload groups tokens by adapter: chunks of tokens of one adapter, over an order of the tokens (kernels/inputs.py). A table on the device
says where each adapter's matrices lie, so that one CUDA graph serves any mixture of adapters. A launch covers the modules behind one matrix product
(q, k and v; gate and up): each has an A of its own, and their outputs lie end to end. Scaling is part of B.

On a GPU a shrink (h = A · x) and an expand (y += B · h) run one after the other. Few tokens leave a GPU idle, so the shrink splits the columns of x,
and the expand or, up to 8 rows, the shrink's last program adds the parts. The expand of gate and up applies the activation, so that neither is written again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from runtime.engine.kernels.activation import Activation, act_mul
from runtime.engine.kernels.inputs import HEADER_WORDS, NUM_CHUNKS, NUM_SAMPLE_CHUNKS
from runtime.engine.kernels.scratch import Scratch

MAX_MODULES = 3  # of one launch
FEW_TOKENS = 256  # up to here chunks are small; a bound between the sizes of CUDA graphs
SMALL_CHUNK = 16
_LARGE_CHUNK = 64


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


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where a step's upload groups tokens by adapter.

    Attributes:
        upload: the step's words.
        word: the header word with the number of chunks. The places of the chunks and of the order follow it.
        most: no upload of such a step has more chunks.
        tokens: no chunk has more tokens.
    """

    upload: Tensor
    word: int
    most: int
    tokens: int


def chunk_tokens(num_tokens: int, *, on_gpu: bool) -> int:
    """Return the largest number of tokens of a chunk, for a step of `num_tokens` tokens. A CPU takes all tokens of an adapter at once."""
    if not on_gpu:
        return max(num_tokens, 1)
    return SMALL_CHUNK if num_tokens <= FEW_TOKENS else _LARGE_CHUNK


def sample_chunk_tokens(num_samples: int, *, on_gpu: bool) -> int:
    """Return the largest number of samples of a chunk. On a GPU it is the same for every graph, because all have room for more samples than a step has."""
    return SMALL_CHUNK if on_gpu else max(num_samples, 1)


def max_chunks(num_tokens: int, num_slots: int, chunk_size: int) -> int:
    """Return a bound of the chunks of at most `chunk_size` tokens in any step of at most `num_tokens` tokens."""
    num_groups = num_slots + 1  # tokens without an adapter are a group, too
    return min(num_tokens, num_tokens // chunk_size + num_groups)


def token_chunks(upload: Tensor, num_tokens: int, num_slots: int, most: int | None = None) -> Chunks:
    """Describe the chunks of all tokens of a step. `most`: None = as many as any step of this size has."""
    size = chunk_tokens(num_tokens, on_gpu=upload.is_cuda)
    return Chunks(upload, NUM_CHUNKS, max_chunks(num_tokens, num_slots, size) if most is None else most, size)


def sample_chunks(upload: Tensor, num_samples: int, num_slots: int) -> Chunks:
    """Describe the chunks of the tokens whose logits are computed, which are numbered in that order."""
    size = sample_chunk_tokens(num_samples, on_gpu=upload.is_cuda)
    return Chunks(upload, NUM_SAMPLE_CHUNKS, max_chunks(num_samples, num_slots, size), size)


def add_adapters(
    y: Tensor,
    x: Tensor,
    chunks: Chunks,
    table: AdapterTable,
    *,
    first_module: int,
    widths: Sequence[int],
    scratch: Scratch | None = None,
) -> None:
    """Add the adapters' products of `x` [T, K] to `y` [T, sum(widths)] in place.

    The modules are `first_module` and those after it, one for each of `widths`, their numbers of outputs. Tokens in no chunk are left alone.
    """
    if y.is_cuda:
        from runtime.engine.kernels.gpu import adapters

        adapters.add_adapters(y, x, chunks, table, first_module, widths, scratch)
    else:
        add_adapters_torch(y, x, chunks, table, first_module, widths)


def add_adapters_gated(
    y: Tensor,
    x: Tensor,
    chunks: Chunks,
    table: AdapterTable,
    activation: Activation,
    *,
    first_module: int,
    widths: Sequence[int],
    scratch: Scratch | None = None,
) -> Tensor:
    """Return act(gate) × up [T, I], where gate and up are `y` [T, 2I] with the adapters' products of `x` [T, K] added.

    `widths` are those of gate and up, or of one module of both. The result of tokens in no chunk is undefined, and so is `y` afterwards.
    """
    if y.is_cuda:
        from runtime.engine.kernels.gpu import adapters

        return adapters.add_adapters_gated(y, x, chunks, table, activation, first_module, widths, scratch)
    return add_adapters_gated_torch(y, x, chunks, table, activation, first_module, widths)


def add_adapters_torch(
    y: Tensor, x: Tensor, chunks: Chunks, table: AdapterTable, first_module: int, widths: Sequence[int]
) -> None:
    """Torch twin of the Triton launches, and the path of a CPU."""
    upload = chunks.upload
    num_chunks, at_chunks, at_order = upload[chunks.word : chunks.word + 3].tolist()
    places = table.places[:, first_module : first_module + len(widths)].tolist()
    in_features = x.shape[1]
    for slot, first, count in upload[at_chunks : at_chunks + 3 * num_chunks].view(-1, 3).tolist():
        if slot < 0:
            continue
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


def add_adapters_gated_torch(
    y: Tensor,
    x: Tensor,
    chunks: Chunks,
    table: AdapterTable,
    activation: Activation,
    first_module: int,
    widths: Sequence[int],
) -> Tensor:
    """Torch twin of the Triton launches, and the path of a CPU."""
    add_adapters_torch(y, x, chunks, table, first_module, widths)
    return act_mul(y, activation)


def zero_upload(device: torch.device) -> Tensor:
    """Return an upload without chunks, over which launches do nothing."""
    return torch.zeros(HEADER_WORDS, dtype=torch.int32, device=device)
