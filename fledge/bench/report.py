"""Rows to files for people and programs: summary.json, report.md, report.html.

The summary is figures and where they came from; both reports are drawn from it alone (and the rows' coloured samples),
so they cannot say anything else. Knows no models. `fledge report` draws them again, or compares several runs.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import fledge.provenance as provenance
from fledge.bench import charts
from fledge.bench.rows import Row, fingerprint
from fledge.bench.stats import summarise
from fledge.console import say, show_table
from fledge.escaping import markdown, one_line, printable
from fledge.outputs import staged, write_file, write_json

TEMPLATES = Path(__file__).with_name("templates")
SUMMARY, MARKDOWN, PAGE = "summary.json", "report.md", "report.html"
FORMAT = 1
MAX_SAMPLES = 8

Document = dict[str, Any]


def write_report(
    folder: Path, rows: Sequence[Row], *, model_id: str, settings: dict[str, Any], config: Any,
    sets: dict[str, Any] | None = None, skipped: Sequence[dict[str, str]] = (),
) -> Document:  # fmt: skip
    """Write the three files and show the table. `sets` are figures already made from other rows (a server's),
    `skipped` the questions that were not measured: dataset, question_id, reason."""
    document: Document = {
        "format": FORMAT,
        "model_id": model_id,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "sets": sets if sets is not None else summarise(rows, seed=settings.get("seed", 0)),
        "skipped": list(skipped),
        "provenance": provenance.collect(config),
    }
    document["verdict"] = verdict(document)
    with staged(folder) as building:
        write_json(building / SUMMARY, document)
        draw(building, document, rows)
    rows_of_table = [table_row(name, figures) for name, figures in document["sets"].items()]
    show_table(model_id, pick(HEADER), [pick(row) for row in rows_of_table])
    say(document["verdict"])
    say(f"report: {folder / PAGE}")
    return document


def draw(folder: Path, document: Document, rows: Sequence[Row]) -> None:
    """Write report.md and report.html."""
    write_file(folder / MARKDOWN, render("report.md.jinja", document, []))
    write_file(folder / PAGE, render("report.html.jinja", document, samples_of(rows)))


def headline(document: Document) -> dict[str, Any]:
    """The figures a report leads with: all sets together, else the only one."""
    sets = document["sets"]
    return sets.get("all") or next(iter(sets.values()))


def verdict(document: Document) -> str:
    """One sentence for somebody who knows nothing of the method."""
    figures, settings = headline(document), document["settings"]
    speedup = figures.get("speedup")
    if "eagle" not in figures:
        return f"The model alone writes {figures['baseline']['tokens_per_s'] or 0:.1f} tokens per second."
    if "baseline" not in figures:
        accepted = figures.get("acceptance", {}).get("tau")
        return (
            f"With this draft head the model writes {figures['eagle']['tokens_per_s'] or 0:.1f} tokens per second"
            + (f", {accepted:.2f} tokens per step" if accepted else "")
            + "; without a plain run beside it there is no speed-up to state."
        )
    if speedup is None:
        return "The answers are too short to measure a speed-up."
    if settings.get("mode") == "aa":
        inside = speedup["low"] is not None and speedup["low"] <= 1.0 <= speedup["high"]
        return f"Plain decoding against itself: ratio {interval_text(speedup)}. " + (
            "As it should, the interval contains 1." if inside else "The interval should contain 1: distrust timings."
        )
    return f"{_speed_clause(speedup)}{_quality_clause(figures.get('quality', {}))}"


def _speed_clause(speedup: dict[str, Any]) -> str:
    low, high, value = speedup["low"], speedup["high"], speedup["value"]
    if low is None:
        return f"One question only: {value:.2f} times the plain speed, with no interval to trust it by"
    if low <= 1.0 <= high:
        return f"No difference in speed can be shown: {interval_text(speedup)} of the plain model's"
    interval = f"(95 % interval {low:.2f} to {high:.2f})"
    if value > 1:
        return f"With this draft head the model writes {value:.2f} times as fast {interval}"
    return f"This draft head slows the model down to {value:.2f} of its plain speed {interval}"


def _quality_clause(quality: dict[str, Any]) -> str:
    if quality.get("compared"):
        if quality["identical"] == quality["compared"]:
            return f", and all {quality['compared']} answers are identical."
        if "unchecked" in quality:
            return (
                f"; {quality['identical']} of {quality['compared']} answers are identical (a server cannot be asked "
                f"whether the others part at a near-tie)."
            )
        if not quality["unexplained"]:
            return (
                f"; {quality['identical']} of {quality['compared']} answers are identical, the others part at a "
                f"near-tie of the model's own scores, which rounding decides."
            )
        return (
            f", BUT {quality['unexplained']} of {quality['compared']} answers differ where the model has a clear "
            f"favourite: that is an error, not rounding."
        )
    difference = quality.get("log_likelihood_difference")
    if difference and difference["low"] is not None:
        if difference["low"] <= 0 <= difference["high"]:
            return ", and the model finds both sides' answers equally likely."
        return ", BUT the model does not find both sides' answers equally likely: look at the quality section."
    return "."


def interval_text(value: dict[str, Any] | None, digits: int = 2) -> str:
    """`1.62 (1.55 to 1.70)`."""
    if value is None:
        return "–"
    text = f"{value['value']:.{digits}f}"
    return text if value["low"] is None else f"{text} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


HEADER = (
    "data set", "asked", "tau", "tau macro", "speed-up (95 %)", "plain tok/s", "eagle tok/s",
    "TTFT ms", "identical", "score",
)  # fmt: skip


def pick(cells: Sequence[str]) -> list[str]:
    """The columns that fit a terminal."""
    return [cells[index] for index in (0, 1, 2, 4, 5, 6, 8)]


def table_row(name: str, figures: dict[str, Any]) -> list[str]:
    """One data set's line, in the order of HEADER."""
    accepted, quality = figures.get("acceptance") or {}, figures.get("quality") or {}
    score = quality.get("score")
    return [
        name, str(figures["questions"]), number(accepted.get("tau")), number(accepted.get("tau_macro")),
        interval_text(figures.get("speedup")),
        *(number((figures.get(side) or {}).get("tokens_per_s"), 1) for side in ("baseline", "eagle")),
        both((figures.get(side) or {}).get("ttft_s_median") for side in ("baseline", "eagle")),
        f"{quality['identical']}/{quality['compared']}" if quality.get("compared") else "–",
        " / ".join(f"{value:.0%}" for value in score.values()) if score else "–",
    ]  # fmt: skip


def category_rows(name: str, figures: dict[str, Any]) -> list[list[str]]:
    """One line per category of a data set: data set, category, questions, tau, speed-up."""
    return [
        [name, category, str(one["questions"]), number(one["tau"]), interval_text(one["speedup"])]
        for category, one in (figures.get("categories") or {}).items()
    ]


def both(seconds: Iterable[float | None]) -> str:
    """Plain / speculative times in milliseconds."""
    return " / ".join(number(value, 1, 1000) for value in seconds)


def number(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value * factor:.{digits}f}"


def samples_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The coloured samples of the rows, a few."""
    found = [
        {"dataset": row["dataset"], "question": row["question"], "rounds": row["turns"][0]["sample"]}
        for row in rows
        if row.get("turns") and row["turns"][0].get("sample")
    ]
    return found[:MAX_SAMPLES]


def render(template: str, document: Document, samples: list[dict[str, Any]]) -> str:
    """Fill one template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape="html" in template, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "interval": interval_text, "markdown": markdown, "one_line": one_line}
    text = environment.get_template(template).render(
        document=document, head=headline(document), sets=document["sets"], header=HEADER, samples=samples,
        table=[table_row(name, figures) for name, figures in document["sets"].items()],
        drawn={name: Markup(drawing) for name, drawing in drawings(document).items()},
        categories=[row for name, figures in document["sets"].items() for row in category_rows(name, figures)],
        named=[name for name, figures in document["sets"].items() if name != "all" and figures.get("acceptance")],
        to_json=lambda value: json.dumps(value, indent=2, ensure_ascii=False, default=str),
    )  # fmt: skip
    return printable(text)


def drawings(document: Document) -> dict[str, str]:
    """Every chart the figures allow."""
    sets, head = document["sets"], headline(document)
    drawn: dict[str, str] = {}
    measured = {name: figures["speedup"] for name, figures in sets.items() if figures.get("speedup")}
    if measured:
        drawn["speedup"] = charts.bars(
            [
                charts.Bar(
                    name, [(one["value"], "s0")], f"{one['value']:.2f}×",
                    (one["low"], one["high"]) if one["low"] is not None else None,
                )
                for name, one in measured.items()
            ],
            mark=1.0, mark_text="plain", description="speed-up per data set",
        )  # fmt: skip
    if any("concurrency" in figures for figures in sets.values()):
        drawn["throughput"] = charts.bars(
            [
                charts.Bar(
                    f"{name}: {label}", [(figures[side]["throughput_tokens_per_s"], style)],
                    f"{figures[side]['throughput_tokens_per_s']:.0f} tok/s",
                )
                for name, figures in sets.items()
                for side, label, style in (("baseline", "plain", "s6"), ("eagle", "with head", "s0"))
                if side in figures
            ],
            description="throughput by data set and requests in flight",
        )  # fmt: skip
    if head.get("acceptance"):
        drawn |= _acceptance_drawings({name: one for name, one in sets.items() if one.get("acceptance")}, head)
    if all((head.get(side) or {}).get("phases_s") for side in ("baseline", "eagle")):
        drawn["time"] = charts.bars(time_bars(head), description="milliseconds per token, plain and speculative")
    if head.get("model") and head.get("speedup"):
        drawn["model"] = charts.bars(model_bars(head), mark=1.0, mark_text="plain", description="from tau to speed-up")
    return drawn


def _acceptance_drawings(sets: dict[str, Any], head: dict[str, Any]) -> dict[str, str]:
    own = {name: figures["acceptance"] for name, figures in sets.items() if name != "all"}
    deepest = max(len(one["by_position"]) for one in own.values())
    if not deepest:  # SGLang tells tau only
        return {}
    positions = [str(position + 1) for position in range(deepest)]
    drawn = {
        kind: charts.lines(
            [charts.Line(name, one[kind]) for name, one in own.items()], positions, axis="position of the draft token",
            percent=True, description=f"acceptance {kind.replace('_', ' ')}",
        )
        for kind in ("by_position", "by_position_conditional")
    }  # fmt: skip
    pooled = head["acceptance"]
    if pooled.get("length_histogram"):
        shares = [count / pooled["rounds"] for count in pooled["length_histogram"]]
        drawn["histogram"] = charts.columns(
            [str(length) for length in range(len(shares))], shares, [f"{share:.0%}" for share in shares],
            axis="draft tokens kept in one round", description="rounds by accepted length",
        )  # fmt: skip
    if calibration := pooled.get("calibration"):
        lines = {"promised": "predicted", "kept": "accepted"}
        drawn["calibration"] = charts.lines(
            [charts.Line(name, [one[key] for one in calibration]) for name, key in lines.items()],
            [str(position + 1) for position in range(len(calibration))], axis="position of the draft token",
            percent=True, description="chance promised and share kept",
        )  # fmt: skip
    if pooled.get("along_output"):
        starts = sorted({one["from"] for figures in own.values() for one in figures["along_output"]})
        series = []
        for name, figures in own.items():
            by_start = {one["from"]: one["tau"] for one in figures["along_output"]}
            series.append(charts.Line(name, [by_start.get(start) for start in starts]))
        drawn["along"] = charts.lines(
            series, [f"{start}+" for start in starts], axis="position in the answer, tokens", floor=1.0,
            description="tau along the answer",
        )  # fmt: skip
    return drawn


def time_bars(figures: dict[str, Any]) -> list[charts.Bar]:
    """Milliseconds per decoded token, speculative time split into its phases."""
    rows = []
    for side, label in (("baseline", "plain"), ("eagle", "with draft head")):
        one = figures[side]
        if not one["decode_tokens"]:
            continue
        unit = 1000.0 / one["decode_tokens"]
        phases = {"verify": one["decode_s"]} if side == "baseline" else one["phases_s"]
        verify, draft = phases.get("verify", 0.0) * unit, phases.get("draft", 0.0) * unit
        rest = max(one["decode_s"] * unit - verify - draft, 0.0)
        rows.append(
            charts.Bar(
                label, [(verify, "s0"), (draft, "s1"), (rest, "s6")], f"{one['decode_s'] * unit:.1f} ms per token"
            )
        )
    return rows


def model_bars(figures: dict[str, Any]) -> list[charts.Bar]:
    """How tau becomes the speed-up, cost by cost."""
    model, speedup = figures["model"], figures["speedup"]
    steps = [
        ("τ: all costs free", model["free"], "s6"),
        ("drafting paid (ideal)", model["ideal"], "s6"),
        ("+ checking the tree", model["after_draft"], "s6"),
        ("+ overhead", model["predicted"], "s6"),
        ("measured", speedup["value"], "s0"),
    ]
    return [charts.Bar(label, [(value, style)], f"{value:.2f}×") for label, value, style in steps if value]
