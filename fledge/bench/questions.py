"""A question of a benchmark, and the names of the sets. Knows no files and no hub."""

import dataclasses
from typing import Any

PICTURE_SETS = ("textvqa", "mmmu", "mmstar")
SPEED_BENCH = {  # and its part of that name
    "speed_bench": "qualitative",
    **{f"speed_bench_{length}": f"throughput_{length}" for length in ("1k", "2k", "8k", "16k", "32k")},
}
NAMED_SETS = (
    "mt_bench", "humaneval", "gsm8k", "alpaca", "qa", "sum", "math500", "spec_bench", *SPEED_BENCH, *PICTURE_SETS,
)  # fmt: skip
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
