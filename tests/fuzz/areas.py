"""The areas, each a module with `cases()`, and its share of a run's cases."""

AREAS: dict[str, float] = {
    "rows": 3,
    "questions": 2,
    "heads": 5,
    "flags": 5,
    "servers": 4,
    "streams": 2,
    "states": 2,
    "stores": 3,
    "answers": 3,
    "recipes": 2,
    "reports": 2,
}
