"""Rows to files for people and programs: summary.json, report.md, report.html.

The summary is figures and where they came from; both reports are drawn from it alone (and the rows' coloured samples),
so they cannot say anything else. Knows no models. `fledge report` draws them again, or compares several runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import fledge.provenance as provenance
from fledge.bench import charts
from fledge.bench.rows import Row, fingerprint
from fledge.bench.sides import IN_TURN, MeasuredRun, joined_document
from fledge.bench.stats import summarise
from fledge.bench.verdict import headline, interval_text, is_noise_run, verdict
from fledge.console import counted, say, show_table
from fledge.escaping import markdown, one_line, printable
from fledge.outputs import staged, write_file, write_json

TEMPLATES = Path(__file__).with_name("templates")
SUMMARY, MARKDOWN, PAGE = "summary.json", "report.md", "report.html"
FORMAT = 1
MAX_SAMPLES = 8
SIDES_OF_A_REPORT = ("baseline", "eagle")
NOTHING = "–"

Document = dict[str, Any]


def write_report(
    folder: Path, rows: Sequence[Row], *, model_id: str, settings: dict[str, Any], config: Any,
    sets: dict[str, Any] | None = None, skipped: Sequence[dict[str, str]] = (), other: MeasuredRun | None = None,
) -> Document:  # fmt: skip
    """Write the three files and show the table. `sets` are figures already made from other rows (a server's),
    `skipped` the questions that were not measured: dataset, question_id, reason; `other` is the run of the other side
    that the rows were put together with."""
    document: Document = {
        "format": FORMAT,
        "model_id": model_id,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "sets": sets if sets is not None else summarise(rows, seed=settings.get("seed", 0)),
        "skipped": list(skipped),
        "provenance": provenance.collect(config),
    }
    if other:
        document |= joined_document(document, other)
    document["verdict"] = verdict(document)
    with staged(folder) as building:
        write_json(building / SUMMARY, document)
        draw(building, document, rows)
    table = table_of(document)
    shown = [column for column in table[0] if column in ON_A_TERMINAL]
    show_table(document["model_id"], shown, [[line[column] for column in shown] for line in table])
    say(document["verdict"])
    say(f"report: {folder / PAGE}")
    return document


def draw(folder: Path, document: Document, rows: Sequence[Row]) -> None:
    """Write report.md and report.html."""
    write_file(folder / MARKDOWN, render("report.md.jinja", document, []))
    write_file(folder / PAGE, render("report.html.jinja", document, samples_of(rows)))


COLUMNS = (
    "data set", "tau", "speed-up (95 %)", "identical", "plain tok/s", "head tok/s", "asked", "tau macro",
    "TTFT ms", "score",
)  # fmt: skip
ON_A_TERMINAL = {"data set", "tau", "speed-up (95 %)", "plain tok/s", "head tok/s", "again tok/s", "identical"}


def table_of(document: Document) -> list[dict[str, str]]:
    """The figures by data set, one line each, without the columns that no line fills."""
    lines = [table_line(name, figures) for name, figures in document["sets"].items()]
    filled = [column for column in COLUMNS if any(line[column] != NOTHING for line in lines)]
    again = {"head tok/s": "again tok/s"} if is_noise_run(document) else {}
    return [{again.get(column, column): line[column] for column in filled} for line in lines]


def labels_of(document: Document) -> dict[str, str]:
    """What the sides are called."""
    second = "plain decoding again" if is_noise_run(document) else "with the draft head"
    return {"baseline": "plain decoding", "eagle": second}


def circumstances(document: Document) -> str:
    """How both sides were measured beside each other."""
    figures = headline(document)
    if len(sides_of(figures)) == 1:
        return "One side only, after a warm-up."
    if document["settings"].get("mode") == IN_TURN:
        return (
            "Same prompts and settings, in two runs, one after the other. What else the machine did may weigh on one "
            "of them: for a speed-up to rely on, measure both sides in one run (--mode both)."
        )
    if "concurrency" in figures:
        return "Same prompts and settings; both sides are servers, asked in alternation where both run."
    return "Same prompts, settings and process; both sides alternate question by question after a warm-up."


def table_line(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """One data set's cells by column."""
    accepted, quality = figures.get("acceptance") or {}, figures.get("quality") or {}
    speeds = [number((figures.get(side) or {}).get("tokens_per_s"), 1) for side in SIDES_OF_A_REPORT]
    waits = [number(figures[side].get("ttft_s_median"), 1, 1000) for side in sides_of(figures)]
    score = quality.get("score")
    cells = (
        name, number(accepted.get("tau")), interval_text(figures.get("speedup")),
        f"{quality['identical']}/{quality['compared']}" if quality.get("compared") else NOTHING,
        *speeds, str(figures["questions"]), number(accepted.get("tau_macro")), " / ".join(waits),
        " / ".join(f"{value:.0%}" for value in score.values()) if score else NOTHING,
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))


def category_rows(name: str, figures: dict[str, Any]) -> list[list[str]]:
    """One line per category of a data set: data set, category, questions, tau, speed-up."""
    return [
        [name, category, str(one["questions"]), number(one["tau"]), interval_text(one["speedup"])]
        for category, one in (figures.get("categories") or {}).items()
    ]


def sides_of(figures: dict[str, Any]) -> list[str]:
    """Which sides were measured, plain decoding first."""
    return [side for side in SIDES_OF_A_REPORT if figures.get(side)]


def number(value: float | None, digits: int = 2, factor: float = 1.0) -> str:
    """A figure, or a dash where there is none."""
    return NOTHING if value is None else f"{value * factor:.{digits}f}"


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
    environment.filters |= {"number": number, "interval": interval_text, "markdown": markdown}
    environment.filters |= {"one_line": one_line, "counted": counted}
    text = environment.get_template(template).render(
        document=document, head=headline(document), sets=document["sets"], samples=samples, table=table_of(document),
        sides=(sides := sides_of(headline(document))), both=len(sides) == 2, labels=labels_of(document),
        circumstances=circumstances(document),
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
                if figures.get(side)
            ],
            description="throughput by data set and requests in flight",
        )  # fmt: skip
    if head.get("acceptance"):
        drawn |= _acceptance_drawings({name: one for name, one in sets.items() if one.get("acceptance")}, head)
    if all((head.get(side) or {}).get("phases_s") for side in ("baseline", "eagle")):
        bars = time_bars(head, labels_of(document))
        drawn["time"] = charts.bars(bars, description="milliseconds per token of both sides")
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


def time_bars(figures: dict[str, Any], labels: dict[str, str]) -> list[charts.Bar]:
    """Milliseconds per decoded token, speculative time split into its phases."""
    rows = []
    for side, label in labels.items():
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
