"""Tables and pictures of `study.py`: a row or a line for each drafter."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from fledge.bench import charts

COLOURS = ("#1f63c7", "#b4530a", "#0b7361", "#7b3fb8", "#66707f")
FLOOR = "lookup"  # it has no seeds


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def picture(series: Sequence[charts.Line], labels: Sequence[str], title: str, *, percent: bool) -> str:
    """A line chart of its own: on white, with the names of its lines above it."""
    chart = charts.lines(series, labels, axis="", description=title, percent=percent, floor=0.0 if percent else 1.0)
    names = "".join(
        f'<tspan class="s{number}" dx="{14 if number else 0}">{line.name}</tspan>' for number, line in enumerate(series)
    )
    colours = "".join(
        f".s{number} {{ fill: {colour} }} polyline.s{number} {{ fill: none; stroke: {colour} }} "
        for number, colour in enumerate(COLOURS[: len(series)])
    )
    width, height = charts.WIDTH, 246
    inner = chart.replace("<svg ", f'<svg y="36" width="{width}" height="210" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width * 1.5:g}">'
        f"<style>{colours}text {{ font: 12px system-ui, sans-serif }} polyline {{ "
        f"stroke-width: 2 }} line {{ stroke: #d8dee4 }} .ink {{ fill: #1f2328 }} .faint {{ fill: #59636e }}</style>"
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        f'<text class="ink" x="12" y="18">{title}</text><text x="12" y="36">{names}</text>'
        f"{inner}</svg>\n"
    )


def table(title: str, keys: Any, groups: dict[str, list[Any]], value: Any) -> Iterator[str]:
    """A row for each drafter: mean (least to most) over its seeds."""
    keys = list(keys)
    yield f"| {title} | seeds | {' | '.join(map(str, keys))} |"
    yield "|---|---|" + "---|" * len(keys)
    for name, found in groups.items():
        cells = [cell([value(one, key) for one in found]) for key in keys]
        yield f"| {name} | {len(found) if name != FLOOR else '-'} | {' | '.join(cells)} |"
    yield ""


def cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle = f"{mean(known):.2f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.2f} to {max(known):.2f})"
