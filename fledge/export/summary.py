"""summary.json of a benchmark, checked as far as it is read again: by model cards, comparisons and redrawn reports."""

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fledge.parsing import convert, read_python_json
from fledge.ranges import Natural

MOST = sys.float_info.max  # so infinity is none, as NaN is
Real = Annotated[float, msgspec.Meta(ge=-MOST, le=MOST)]
Figure = Annotated[float, msgspec.Meta(ge=0, le=MOST)]
HINT = "Run the benchmark's command again to rewrite it."


class Interval(msgspec.Struct):
    """A figure, and where it may lie; None where one question allows no interval."""

    value: Real
    low: Real | None = None
    high: Real | None = None


class Ratio(msgspec.Struct):
    """How many times as fast, and where that may lie."""

    value: Figure
    low: Figure | None = None
    high: Figure | None = None


class Acceptance(msgspec.Struct):
    tau: Figure | None = None
    tau_macro: Figure | None = None
    by_position: list[Figure | None] | None = None


class Side(msgspec.Struct):
    tokens_per_s: Figure | None
    ttft_s_median: Figure | None = None


class Quality(msgspec.Struct):
    compared: Natural = 0
    identical: Natural = 0
    unexplained: Natural | None = None
    score: dict[str, Real | None] | None = None
    log_likelihood_difference: Interval | None = None


class Figures(msgspec.Struct):
    """One data set."""

    questions: Natural = 0
    speedup: Ratio | None = None
    acceptance: Acceptance | None = None
    quality: Quality | None = None
    baseline: Side | None = None
    eagle: Side | None = None


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


class Run(Summary, kw_only=True):
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
