"""Columns of text within a width: the first one stays whole, and less important ones are left out first."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.cli.columns import Column, fit, lines

cells = st.lists(st.text("abc ä→", max_size=12), min_size=3, max_size=3)
columns = st.lists(st.builds(Column, st.text("AB", min_size=1, max_size=9), cells, st.integers(0, 5), st.booleans()))


def headings(chosen: list[Column]) -> list[str]:
    return [column.heading for column in chosen]


def test_fit_leaves_out_the_highest_rank_first() -> None:
    table = [
        Column("NAME", ["n" * 20]),
        Column("STATE", ["loaded"], 1),
        Column("PODS", ["a"], 9),
        Column("RUN", ["3"], 5),
    ]
    assert headings(fit(table, 80)) == ["NAME", "STATE", "PODS", "RUN"]
    assert headings(fit(table, 36)) == ["NAME", "STATE", "RUN"]
    assert headings(fit(table, 30)) == ["NAME", "STATE"]
    assert headings(fit(table, 5)) == ["NAME"]


def test_fit_leaves_out_empty_columns() -> None:
    assert headings(fit([Column("NAME", ["a"]), Column("WAIT", [""], 1)], 80)) == ["NAME"]


@given(columns, st.integers(1, 60))
def test_lines_are_no_wider_than_the_terminal_or_its_names(table: list[Column], width: int) -> None:
    chosen = fit(table, width)
    found = [line.plain for line in lines(table, width)]
    assert len(found) == (4 if chosen else 0)
    if any(column.rank for column in chosen):
        assert all(len(line) <= width for line in found)
    assert [column for column in chosen if column.rank == 0] == [column for column in table if column.rank == 0]
