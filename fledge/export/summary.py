"""summary.json of a benchmark, checked as far as it is read again: by model cards, comparisons and redrawn reports."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from fledge.parsing import convert, read_python_json
from fledge.ranges import Finite, Natural, NotNegative

HINT = "Run the benchmark's command again to rewrite it."


class Interval(msgspec.Struct):
    """A figure, and where it may lie; None where one question allows no interval."""

    value: Finite
    low: Finite | None = None
    high: Finite | None = None


class Ratio(msgspec.Struct):
    """How many times as fast, and where that may lie."""

    value: NotNegative
    low: NotNegative | None = None
    high: NotNegative | None = None


class Acceptance(msgspec.Struct):
    tau: NotNegative | None = None
    tau_macro: NotNegative | None = None
    by_position: list[NotNegative | None] | None = None


class Side(msgspec.Struct):
    tokens_per_s: NotNegative | None
    ttft_s_median: NotNegative | None = None


class Quality(msgspec.Struct):
    compared: Natural = 0
    identical: Natural = 0
    unexplained: Natural | None = None
    score: dict[str, Finite | None] | None = None
    log_likelihood_difference: Interval | None = None


class Category(msgspec.Struct):
    """The questions of one category of a set."""

    questions: Natural
    tau: NotNegative | None
    speedup: Ratio | None


class Figures(msgspec.Struct):
    """One data set."""

    questions: Natural = 0
    speedup: Ratio | None = None
    acceptance: Acceptance | None = None
    quality: Quality | None = None
    baseline: Side | None = None
    eagle: Side | None = None
    categories: dict[str, Category] | None = None


class Hardware(msgspec.Struct):
    cpu: str | None = None
    gpus: list[str] | None = None


class Tree(msgspec.Struct):
    total_token: int
    depth: int
    top_k: int


class Settings(msgspec.Struct):
    tree: Tree | None = None
    hardware: Hardware | None = None


class Summary(msgspec.Struct):
    sets: Annotated[dict[str, Figures], msgspec.Meta(min_length=1)]
    settings: Settings = msgspec.field(default_factory=Settings)


class BenchSummary(Summary, kw_only=True):
    """A whole summary, of which a report can be drawn."""

    format: int
    model_id: str
    fingerprint: str
    settings: Settings


def read_summary(path: Path, kind: type[Summary] = Summary) -> dict[str, Any]:
    """The document as it stands, its fields checked."""
    document = read_python_json(path, dict[str, Any], hint=HINT)
    convert(document, kind, str(path), hint="It is not the summary.json of a `fledge bench` run.")
    return document
