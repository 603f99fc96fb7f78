"""Draw one run's report again, or put several runs side by side.

Reads summary.json files (or the folders that hold them). Compares figures of equal data sets and says what else was
different, because a tau is only comparable with tree, temperature, turns and prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from fledge.bench.report import FORMAT, PAGE, SUMMARY, draw, number, render
from fledge.bench.rows import BENCHMARK, rows_of
from fledge.bench.verdict import interval_text, verdict
from fledge.console import say, show_table, warn
from fledge.errors import UserError
from fledge.escaping import markdown, one_line
from fledge.export import summary
from fledge.outputs import claim, document_has, staged, write_file, write_json

Document = dict[str, Any]
COLUMNS = ("data set", "run", "tau", "speed-up (95 %)", "plain tok/s", "head tok/s", "against the first")
HEADING = "| " + " | ".join(COLUMNS) + " |"


def show_report(path: Path, *, overwrite: bool) -> None:
    """Draw the report of one run again."""
    document = read_summary(path)
    refuse_undrawable(path, document)
    redraw(_folder(path), document, overwrite=overwrite)


def show_comparison(paths: Sequence[Path], output: Path | None, *, overwrite: bool) -> None:
    """Put the summaries of several benchmarks side by side, and write the table where `output` says."""
    documents = [read_summary(path) for path in paths]
    if output and output.exists() and not overwrite and not is_comparison(output):
        raise UserError(f"{output}: is there and no comparison. Name another file, or give --overwrite.")
    rows = compare(documents)
    show_table("comparison", COLUMNS, rows)
    differing = different_settings(documents)
    for key, values in differing.items():
        warn(f"the runs differ in {key}: {' | '.join(map(str, values))}")
    if output:
        write_comparison(output, rows, differing)
        say(f"comparison: {output}")


def read_summary(path: Path) -> Document:
    """A summary.json, given itself or by its folder."""
    file = path / SUMMARY if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file. Give a {SUMMARY} written by `fledge bench`, or its folder.")
    document = summary.read_summary(file, summary.BenchSummary)
    if document["format"] != FORMAT:
        raise UserError(f"{file}: not a summary of `fledge bench` in format {FORMAT}. Give the {SUMMARY} of a run.")
    return document


def refuse_undrawable(path: Path, document: Document) -> None:
    """A UserError for a summary that lacks what a report shows and a comparison does not need."""
    try:
        render("report.html.jinja", {**document, "verdict": verdict(document)}, [])
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, jinja2.UndefinedError) as error:
        problem = f"a figure is missing or no number ({type(error).__name__}: {one_line(error)[:200]})"
        raise UserError(f"{path}: no report can be drawn of its {SUMMARY}: {problem}. {summary.HINT}") from None


def redraw(folder: Path, document: Document, *, overwrite: bool) -> None:
    """Write report.md and report.html of a finished run again."""
    document["verdict"] = verdict(document)
    rows = rows_of(folder, document["fingerprint"])
    with claim(folder, BENCHMARK, overwrite=overwrite, clear=False), staged(folder) as building:
        draw(building, document, rows)
    say(document["verdict"])
    say(f"report: {folder / PAGE}")


def compare(documents: list[Document]) -> list[list[str]]:
    """One line per data set and run; the last column sets it against the first run that has the data set."""
    names = list(dict.fromkeys(name for document in documents for name in document["sets"]))
    lines = []
    for name in names:
        having = [(document["model_id"], document["sets"][name]) for document in documents if name in document["sets"]]
        lines += [compare_line(name, run, figures, having[0][1]) for run, figures in having]
    return lines


def compare_line(name: str, run: str, figures: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """One run on one data set."""
    speeds = [number((figures.get(side) or {}).get("tokens_per_s"), 1) for side in ("baseline", "eagle")]
    accepted = (figures.get("acceptance") or {}).get("tau")
    change = "first" if figures is first else change_text(figures.get("speedup"), first.get("speedup"))
    return [name, run, number(accepted), interval_text(figures.get("speedup")), *speeds, change]


def change_text(one: dict[str, Any] | None, first: dict[str, Any] | None) -> str:
    """The change of the speed-up, and whether the intervals keep apart."""
    if not one or not first:
        return "–"
    text = f"{one['value'] / first['value'] - 1:+.1%}"
    if one["low"] is None or first["low"] is None:
        return text
    apart = one["low"] > first["high"] or one["high"] < first["low"]
    return text + (" (clear)" if apart else " (intervals overlap)")


def different_settings(documents: list[Document]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, heads and file checksums aside."""
    ignored = {"head", "head_files", "target_files", "code", "checks", "run_code"}
    keys = list(dict.fromkeys(key for document in documents for key in document["settings"] if key not in ignored))
    values = {key: [document["settings"].get(key) for document in documents] for key in keys}
    return {key: some for key, some in values.items() if any(value != some[0] for value in some)}


def is_comparison(path: Path) -> bool:
    """Whether this file was written by `write_comparison`."""
    if path.suffix == ".json":
        return document_has(path, "rows", "different")
    return path.is_file() and path.read_bytes().startswith(HEADING.encode())


def write_comparison(path: Path, rows: list[list[str]], differing: dict[str, list[Any]]) -> None:
    """The table for people, or JSON for programs."""
    if path.suffix == ".json":
        write_json(path, {"rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows], "different": differing})
        return
    lines = [HEADING, "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    lines.append("")
    for key, some in differing.items():
        lines.append(f"- the runs differ in {markdown(key)}: {' | '.join(map(markdown, some))}")
    write_file(path, "\n".join(lines).rstrip() + "\n")


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
