"""Groups the rows of a step into attention tiles for a CPU, once per step for all layers.

Decode rows of similar length form one tile: their pages are gathered side by side, padded and masked. A prefill row
forms a tile for every few hundred queries, so that no mask grows with the square of a prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

QUERY_TILE = 512
# A row joins a tile while its padding is less than this share of its own pages. A separate tile costs one more kernel call.
PADDING_SHARE = 0.25
PADDING_PAGES = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """`num_rows` rows of `num_queries` queries each, over `length` keys each.

    Attributes:
        tokens: indices of the queries in the batch, row by row, as a slice or a tensor.
        pages: [num_rows · pages per row] int64, page ids row by row. Short rows are padded with any mapped page.
        first_page: the first of `pages`.
        page_step: for a single row, the constant difference between adjacent page ids, or -1 if it has one page. 0
            otherwise.
        bias: [num_rows, 1, num_queries, length], 0 or -inf, added to the scores. None if every query sees all keys or
            `causal` is set.
        causal: query i sees keys 0 … i.
    """

    tokens: slice | torch.Tensor
    num_rows: int
    num_queries: int
    pages: torch.Tensor
    first_page: int
    page_step: int
    length: int
    bias: torch.Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class _Row:
    first_token: int
    num_queries: int
    context: int
    slot: int


class AttentionPlan:
    """The attention tiles of one step, for each window and type that its layers use."""

    def __init__(
        self,
        page_table: torch.Tensor,
        row_slots: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        block_tokens: int,
    ) -> None:
        starts, contexts, slots = query_starts.tolist(), context_lens.tolist(), row_slots.tolist()
        rows = [
            _Row(start, end - start, context, slot)
            for start, end, context, slot in zip(starts, starts[1:], contexts, slots, strict=False)
            if end > start
        ]
        self._decode = [row for row in rows if row.num_queries == 1]
        self._prefill = [row for row in rows if row.num_queries > 1]
        self._page_table = page_table
        self._block_tokens = block_tokens
        self._tiles: dict[tuple[int, torch.dtype], list[Tile]] = {}

    def tiles(self, window: int, dtype: torch.dtype) -> list[Tile]:
        """Return the tiles for a window and the type of the scores' bias.

        `window` is the number of positions that a query sees, its own included. 0 means all.
        """
        key = (window, dtype)
        if key not in self._tiles:
            tiles = [self._decode_tile(group, window, dtype) for group in self._groups(window)]
            tiles += [tile for row in self._prefill for tile in self._prefill_tiles(row, window, dtype)]
            self._tiles[key] = tiles
        return self._tiles[key]

    def _pages_seen(self, window: int, first: int, last: int) -> tuple[int, int]:
        """Return the page table entries [begin, end) that queries at positions `first` … `last` need."""
        begin = max(0, first + 1 - window) // self._block_tokens if window else 0
        return begin, last // self._block_tokens + 1

    def _groups(self, window: int) -> Iterator[list[_Row]]:
        def num_pages(row: _Row) -> int:
            first, end = self._pages_seen(window, row.context - 1, row.context - 1)
            return end - first

        group: list[_Row] = []
        for row in sorted(self._decode, key=num_pages, reverse=True):
            if group and num_pages(group[0]) > (1 + PADDING_SHARE) * num_pages(row) + PADDING_PAGES:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _decode_tile(self, group: list[_Row], window: int, dtype: torch.dtype) -> Tile:
        group = sorted(group, key=lambda row: row.first_token)
        size = self._block_tokens
        seen = [self._pages_seen(window, row.context - 1, row.context - 1) for row in group]
        width = max(end - first for first, end in seen)
        slots = torch.tensor([row.slot for row in group])
        firsts = torch.tensor([first for first, _ in seen])
        ends = torch.tensor([end for _, end in seen])
        columns = torch.minimum(
            firsts[:, None] + torch.arange(width), ends[:, None] - 1
        )  # a short row repeats its last page
        pages = self._page_table[slots[:, None], columns].flatten().long()
        first_token = group[0].first_token
        consecutive = all(row.first_token == first_token + i for i, row in enumerate(group))
        tokens = (
            slice(first_token, first_token + len(group))
            if consecutive
            else torch.tensor([row.first_token for row in group])
        )
        contexts = torch.tensor([row.context for row in group])
        reach = contexts - firsts * size  # number of columns that hold keys of the row
        length = int(reach.max())
        column = torch.arange(length)
        hidden = column >= reach[:, None]
        if window:
            hidden |= column < (reach - window)[:, None]
        bias = _bias(hidden, dtype).view(len(group), 1, 1, length) if bool(hidden.any()) else None
        return Tile(
            tokens,
            len(group),
            1,
            pages,
            int(pages[0]),
            _page_step(pages) if len(group) == 1 else 0,
            length,
            bias,
            causal=False,
        )

    def _prefill_tiles(self, row: _Row, window: int, dtype: torch.dtype) -> Iterator[Tile]:
        size = self._block_tokens
        before = row.context - row.num_queries
        whole = before == 0 and not (window and window < row.context)
        tile_queries = row.num_queries if whole else QUERY_TILE
        for begin in range(0, row.num_queries, tile_queries):
            end = min(begin + tile_queries, row.num_queries)
            last = before + end - 1
            first_page, end_page = self._pages_seen(window, before + begin, last)
            pages = self._page_table[row.slot, first_page:end_page].long()
            length = last + 1 - first_page * size
            bias = None
            if not whole:
                position = torch.arange(before + begin, before + end)[:, None]
                key = torch.arange(first_page * size, last + 1)
                hidden = key > position
                if window:
                    hidden |= position - key >= window
                bias = _bias(hidden, dtype).view(1, 1, end - begin, length)
            tokens = slice(row.first_token + begin, row.first_token + end)
            yield Tile(tokens, 1, end - begin, pages, int(pages[0]), _page_step(pages), length, bias, causal=whole)


def _bias(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _page_step(pages: torch.Tensor) -> int:
    ids = pages.tolist()
    if len(ids) == 1:
        return -1
    step: int = ids[1] - ids[0]
    return step if step > 0 and all(b - a == step for a, b in pairwise(ids)) else 0
