"""`fledge report`: draw one run's report again, or put several runs side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fledge.errors import UserError
from fledge.outputs import OverwriteSettings


@dataclass(frozen=True, kw_only=True)
class ReportArgs(OverwriteSettings):
    """Which runs to show."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """summary.json files or output folders. One: its report is drawn again. Several: they are compared."""
    output: Path | None = None
    """Write the comparison to this file (.json, else markdown)."""


def report(args: ReportArgs) -> None:
    """Draw a benchmark's report again, or compare the summaries of several benchmarks."""
    from fledge.bench.compare import show_comparison, show_report

    if not args.paths:
        raise UserError("no run given. Name one summary.json to draw its report again, or several to compare them.")
    if len(args.paths) == 1:
        return show_report(args.paths[0], overwrite=args.overwrite)
    show_comparison(args.paths, args.output, overwrite=args.overwrite)
