"""The areas, each a module with `cases()`, and its share of a run's cases."""

AREAS: dict[str, float] = {
    "rows": 3,
    "questions": 2,
    "heads": 5,
    "flags": 5,
    "servers": 4,
}
