"""The areas: modules with a strategy `cases()`, each with its share of a run's cases."""

import importlib

from hypothesis.strategies import SearchStrategy

from fuzz.harness import Case

AREAS = {
    "rows": 15, "questions": 8, "heads": 20, "flags": 16, "servers": 10, "streams": 5, "states": 3, "stores": 8,
    "answers": 8, "recipes": 5, "reports": 8, "folders": 6, "pictures": 4,
}  # fmt: skip


def cases_of(area: str) -> SearchStrategy[Case]:
    return importlib.import_module(f"fuzz.{area}").cases()


def shares(number: int, areas: list[str]) -> dict[str, int]:
    """How many of `number` cases each of these areas gets."""
    total = sum(AREAS[area] for area in areas)
    return {area: max(round(number * AREAS[area] / total), 1) for area in areas}
