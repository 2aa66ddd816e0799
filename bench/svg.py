"""Draws line charts as SVG, for the pages in docs/benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]


def line_chart(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Return an SVG with one line per series. Both axes begin at 0."""
    most_x = max(x for each in series for x, _ in each.points)
    most_y = max(max(y for each in series for _, y in each.points), 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
        return _MARGIN + x / most_x * width, _HEIGHT - _MARGIN - y / most_y * height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for tick in range(_TICKS):
        x, y = most_x * tick / (_TICKS - 1), most_y * tick / (_TICKS - 1)
        at_x, bottom = place(x, 0)
        left, at_y = place(0, y)
        parts.append(f'<line x1="{left}" y1="{at_y:.1f}" x2="{_WIDTH - _MARGIN}" y2="{at_y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at_y + 4:.1f}" text-anchor="end">{y:.0f}</text>')
        parts.append(f'<text x="{at_x:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.0f}</text>')
    for number, each in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in each.points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at_y = 18 + 14 * number
        parts.append(f'<text x="{_MARGIN + 8}" y="{at_y}" fill="{colour}">{escape(each.name)}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 14 {_HEIGHT / 2})">{escape(y_label)}</text>'
    )
    return "\n".join((*parts, "</svg>", ""))
