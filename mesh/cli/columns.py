"""Lays out rows as columns of text within the width of a terminal. The first column never shrinks; less important ones are left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """A heading with one cell per row. `rank` orders the columns by importance: the highest rank is left out first.

    A column of rank 0 is never left out. One without any text is always left out.
    """

    heading: str
    cells: Sequence[str | Text]
    rank: int = 0
    right: bool = False

    @property
    def width(self) -> int:
        return max(cell_len(self.heading), *(cell_len(str(cell)) for cell in self.cells), 0)


def fit(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns that fit `width`, in their order. Columns of rank 0 stay, whatever their width."""
    chosen = [column for column in columns if column.rank == 0 or any(map(str, column.cells))]
    while _total_width(chosen) > width:
        least = max(chosen, key=lambda column: column.rank, default=None)
        if least is None or least.rank == 0:
            break
        chosen.remove(least)
    return chosen


def lines(columns: Sequence[Column], width: int) -> list[Text]:
    """Return the heading and one line per row. A line is wider than `width` only if the columns of rank 0 alone are."""
    chosen = fit(columns, width)
    rows = [Text(style="bold"), *(Text() for _ in chosen[0].cells)] if chosen else []
    for position, column in enumerate(chosen):
        is_last = position == len(chosen) - 1
        for row, cell in zip(rows, (column.heading, *column.cells), strict=True):
            padding = " " * (column.width - cell_len(str(cell)))
            row.append(padding if column.right else "")
            row.append_text(cell if isinstance(cell, Text) else Text(cell))
            row.append("" if is_last else (padding if not column.right else "") + _GAP)
    for row in rows:
        row.rstrip()
    return rows


def _total_width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + len(_GAP) * max(len(columns) - 1, 0)
