"""A question of a benchmark, and the names of the sets. Knows no files and no hub."""

import dataclasses
from typing import Any

PICTURE_SETS = ("textvqa", "mmmu", "mmstar")
NAMED_SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca", "qa", "sum", "math500", *PICTURE_SETS)
Turn = str | list[dict[str, Any]]
BENCH_DIR_VARIABLE = "FLEDGE_BENCH_DIR"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question: its user turns in order, and what a right answer is, where the set says so."""

    dataset: str
    id: str
    category: str
    turns: tuple[Turn, ...]
    system: str | None = None
    reference: tuple[str, ...] = ()
    code_check: dict[str, str] | None = None  # humaneval: prompt, test, entry_point
