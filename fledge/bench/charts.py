"""Three kinds of chart as inline SVG: horizontal bars, columns, lines. No script, no network.

Colours are classes (`s0`, `s1`, ... for series; `ink`, `faint`, `grid`), so that the page's style sheet can give them
one value for light and one for dark. Text has the size of the page's small print. Knows numbers and labels.
"""

import dataclasses
from collections.abc import Sequence
from html import escape

WIDTH = 460
ROW = 30
CHARACTER = 7.3  # mean width of a character at 12 px, for layout


@dataclasses.dataclass(frozen=True)
class Bar:
    """One horizontal bar: stacked parts (value, series class), the text behind it, and an interval where known."""

    label: str
    parts: Sequence[tuple[float, str]]
    text: str
    interval: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        """The bar's whole length."""
        return sum(value for value, _ in self.parts)

    @property
    def reach(self) -> float:
        """How far to the right anything of it is drawn."""
        return max(self.total, self.interval[1] if self.interval else 0.0)


@dataclasses.dataclass(frozen=True)
class Line:
    """One series of a line chart; a None is a gap."""

    name: str
    values: Sequence[float | None]


def bars(rows: Sequence[Bar], *, description: str, mark: float | None = None, mark_text: str = "") -> str:
    """Horizontal bars with their values behind them, and a dashed line at `mark`."""
    left = min(230.0, max(len(row.label) for row in rows) * CHARACTER + 12)
    right = max(len(row.text) for row in rows) * CHARACTER + 12
    span = max([row.reach for row in rows] + ([mark] if mark else [])) or 1.0
    scale = (WIDTH - left - right) / span
    top, height = (18 if mark else 4), ROW * len(rows) + (22 if mark else 8)
    body = []
    if mark:
        x = left + mark * scale
        body.append(_line(x, top - 2, x, height, "mark") + _text(x, 11, mark_text, "faint", "middle"))
    for index, row in enumerate(rows):
        y = top + index * ROW
        body.append(_text(left - 8, y + 18, row.label, "ink", "end"))
        x = left
        for value, style in row.parts:
            body.append(_rect(x, y + 5, max(value * scale, 0.5), 18, style))
            x += value * scale
        if row.interval:
            low, high = (left + end * scale for end in row.interval)
            body.append(_line(low, y + 14, high, y + 14, "whisker"))
            body += [_line(end, y + 9, end, y + 19, "whisker") for end in (low, high)]
        body.append(_text(left + row.reach * scale + 8, y + 18, row.text, "ink"))
    return _svg(height, body, description)


def columns(
    labels: Sequence[str], values: Sequence[float], texts: Sequence[str], *, axis: str, description: str
) -> str:
    """Vertical columns, each with its value on top and its label below."""
    height, base, top = 210, 168, 22
    step = (WIDTH - 20) / len(values)
    width = min(46.0, step * 0.7)
    peak = max(values) or 1.0
    body = [_line(10, base, WIDTH - 10, base, "grid")]
    for index, (label, value, text) in enumerate(zip(labels, values, texts, strict=True)):
        middle = 10 + step * (index + 0.5)
        tall = (base - top) * value / peak
        body += [
            _rect(middle - width / 2, base - tall, width, tall, "s0"),
            _text(middle, base - tall - 6, text, "ink", "middle"),
            _text(middle, base + 17, label, "faint", "middle"),
        ]
    body.append(_text(WIDTH / 2, height - 4, axis, "faint", "middle"))
    return _svg(height, body, description)


def lines(
    series: Sequence[Line], labels: Sequence[str], *, axis: str, description: str, percent: bool = False,
    floor: float = 0.0,
) -> str:  # fmt: skip
    """Line chart over labelled positions. Every point is marked; the last one carries its value."""
    left, right, base, top = 44, 50, 168, 12
    height = 210
    known = [value for line in series for value in line.values if value is not None]
    peak = 1.0 if percent else max([*known, floor + 1.0]) * 1.05
    step = (WIDTH - left - right) / max(len(labels) - 1, 1)

    def spot(index: int, value: float) -> tuple[float, float]:
        x = left + step * index if len(labels) > 1 else (left + WIDTH - right) / 2
        return x, base - (base - top) * (value - floor) / (peak - floor)

    body = []
    for tick in range(5):
        value = floor + (peak - floor) * tick / 4
        y = spot(0, value)[1]
        text = f"{value:.0%}" if percent else f"{value:.1f}"
        body += [_line(left, y, WIDTH - right, y, "grid"), _text(left - 8, y + 4, text, "faint", "end")]
    body += [_text(spot(i, floor)[0], base + 17, label, "faint", "middle") for i, label in enumerate(labels)]
    ends: list[tuple[float, float, str, str]] = []
    for number, line in enumerate(series):
        spots = [(*spot(index, value), value) for index, value in enumerate(line.values) if value is not None]
        if not spots:
            continue
        style = f"s{number % 7}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        body.append(f'<polyline class="line {style}" points="{path}"/>')
        body += [_point(x, y, style, number) for x, y, _ in spots]
        x, y, value = spots[-1]
        ends.append((x, y, f"{value:.0%}" if percent else f"{value:.2f}", f"{style} value"))
    body += _end_labels(ends)
    body.append(_text((left + WIDTH - right) / 2, height - 4, axis, "faint", "middle"))
    return _svg(height, body, description)


def _end_labels(ends: list[tuple[float, float, str, str]]) -> list[str]:
    """The last value beside each line, in the lines' order from top to bottom, 13 px apart at least."""
    placed, last = [], -100.0
    for x, y, text, style in sorted(ends, key=lambda end: end[1]):
        last = max(y, last + 13)
        placed.append(_text(x + 9, last + 4, text, style))
    return placed


def _point(x: float, y: float, style: str, number: int) -> str:
    """A marker; its shape differs by series, so that colour is not the only difference."""
    if number % 3 == 0:
        return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
    if number % 3 == 1:
        return f'<rect class="{style}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    return f'<path class="{style}" d="M{x:.1f} {y - 5:.1f}l4.5 8h-9z"/>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, body: Sequence[str], description: str) -> str:
    inside = "".join(body)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(description, quote=True)}">{inside}</svg>'
    )
