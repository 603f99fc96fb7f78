"""Two runs of one side each in the same folder, put together: `--mode eagle` and `--mode baseline`, in either order.

run.json says what the last run measured and, if it belongs to it, the run of the other side. The two belong together
when everything is equal but what plain decoding knows nothing of: the head and its tree. Knows rows and settings.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import fledge.provenance as provenance
from fledge.bench.measure import BenchEngine
from fledge.bench.quality import compare_outputs
from fledge.bench.questions import Question
from fledge.bench.rows import KEY_FIELDS, Key, Row, row_key, rows_of, without_names
from fledge.console import say, warn
from fledge.errors import UserError
from fledge.parsing import read_python_json
from fledge.redaction import redacted

RUN = "run.json"
OTHER = {"eagle": "baseline", "baseline": "eagle"}
OF_THE_HEAD = {
    "mode", "head", "head_files", "adaptive", "tree", "num_speculative_tokens", "baseline_url", "eagle_url",
}  # fmt: skip
IN_TURN = "eagle and baseline, one after the other"


class MeasuredRun(msgspec.Struct):
    """What run.json says of a run."""

    settings: dict[str, Any]
    fingerprint: str
    model_id: str = ""
    command: str = ""
    other: "MeasuredRun | None" = None


def record_run(folder: Path, args: Any, settings: dict[str, Any], fingerprint: str) -> MeasuredRun | None:
    """Write run.json, and return the earlier run that measured the other side under the same settings."""
    other = other_run(folder, settings)
    provenance.write(
        folder / RUN, args, settings=settings, fingerprint=fingerprint, model_id=args.model_id,
        other=msgspec.to_builtins(other),
    )  # fmt: skip
    return other


def other_run(folder: Path, settings: dict[str, Any]) -> MeasuredRun | None:
    """The folder's run of the other side, or None where there is none; one that does not fit is named."""
    wanted = OTHER.get(settings.get("mode", ""))
    last = read_run(folder / RUN)
    found = next((run for run in (last, last and last.other) if run and run.settings.get("mode") == wanted), None)
    if wanted is None or found is None:
        return None
    mine, theirs = plain_settings(settings), plain_settings(found.settings)
    differing = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if differing:
        warn(
            f"the run of --mode {wanted} in {folder} differs in {', '.join(differing)}: its rows are kept, and the "
            f"report is of --mode {settings['mode']} alone. Run both with the same flags to see the speed-up."
        )
        return None
    found.other = None
    return found


def read_run(path: Path) -> MeasuredRun | None:
    """run.json; None where it is missing, of an earlier version or damaged: it is written anew."""
    try:
        return read_python_json(path, MeasuredRun)
    except UserError:
        return None


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that plain decoding depends on, as a JSON document holds them."""
    some = {name: value for name, value in without_names(settings).items() if name not in OF_THE_HEAD}
    return json.loads(json.dumps(redacted(some), default=str))


def counterparts(rows: Sequence[Row], folder: Path, other: MeasuredRun | None) -> list[Row]:
    """The other side's row of every row, in the same order; none at all when one is missing."""
    if other is None:
        return []
    theirs = {pair_key(row): row for row in rows_of(folder, other.fingerprint)}
    missing = sum(pair_key(row) not in theirs for row in rows)
    mode = other.settings["mode"]
    if missing:
        warn(
            f"the run of --mode {mode} in this folder lacks {missing} of these {len(rows)} rows: the report is of one "
            f"side. Run it again with the same questions."
        )
        return []
    say(f"put together with the rows of --mode {mode} in this folder.")
    return [theirs[pair_key(row)] for row in rows]


def pair_key(row: Row) -> tuple[str, ...]:
    """What the rows of both sides have in common."""
    return tuple(str(row.get(field, "")) for field in KEY_FIELDS if field != "side")


def joined_document(document: dict[str, Any], other: MeasuredRun) -> dict[str, Any]:
    """What a summary says of two runs: the settings and the name of the one with the head, and both commands."""
    last_is_plain = document["settings"]["mode"] == "baseline"
    of_the_head = {"model_id": other.model_id, "fingerprint": other.fingerprint} if last_is_plain else {}
    settings = other.settings if last_is_plain else document["settings"]
    return {**of_the_head, "settings": {**settings, "mode": IN_TURN}, "earlier_command": other.command}


def joined_rows(
    rows: Sequence[Row],
    others: Sequence[Row],
    questions: Mapping[Key, Question],
    load: Callable[[], BenchEngine] | None,
) -> list[Row]:
    """Rows of two sides in one process as rows of both. Greedy answers are compared; `load` makes the engine that is
    asked about near-ties, and is called once if answers differ. None: the answers were drawn."""
    engine = functools.cache(load) if load else None
    return [joined_row(row, other, questions[row_key(row)], engine) for row, other in zip(rows, others, strict=True)]


def joined_row(row: Row, other: Row, question: Question, engine: Callable[[], BenchEngine] | None) -> Row:
    """One question's row of both sides; a question that one side skipped stays skipped."""
    if row.get("skipped") or other.get("skipped"):
        return row if row.get("skipped") else other
    turns = [{**one, **another} for one, another in zip(row["turns"], other["turns"], strict=True)]
    for turn, one, another in zip(turns, row["turns"], other["turns"], strict=True):
        turn["check"] = {**one.get("check", {}), **another.get("check", {})}
    if engine:
        check_turns(turns, question, engine)
    return {
        **row, "turns": turns, "score": {**row["score"], **other["score"]},
        "peak_memory_bytes": max(row["peak_memory_bytes"], other["peak_memory_bytes"]),
    }  # fmt: skip


def check_turns(turns: Sequence[dict[str, Any]], question: Question, engine: Callable[[], BenchEngine]) -> None:
    """Compare the answers of both sides. Behind a difference the conversations part and cannot be compared."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    for content, turn in zip(question.turns, turns, strict=True):
        messages.append({"role": "user", "content": content})
        outputs = {side: turn[side]["token_ids"] for side in ("baseline", "eagle")}
        turn["check"] = {"identical": True}
        if outputs["baseline"] != outputs["eagle"]:
            turn["check"] = compare_outputs(engine(), engine().prompt(messages), outputs, greedy=True)
            return
        messages.append({"role": "assistant", "content": turn["baseline"]["text"]})
