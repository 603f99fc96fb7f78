"""Files that a benchmark leaves and reads again: summaries, rows, tree profiles."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fledge import provenance
from fledge.bench.rows import open_results
from fledge.decoding.tree_profile import TreeProfile, read_profile, write_profile
from fledge.drafters.tree import TreeShape
from fuzz.documents import NO_INT, NO_LIST, NO_NUMBER, NO_OBJECT, NO_SIZE, NO_TEXT, broken_fields, broken_text, encoded
from fuzz.harness import Case, WrongValue
from fuzz.stages import run_through

AREA = "reports and profiles"
SPEEDUP = {"value": 1.5, "low": 1.2, "high": 1.8}
SIDE = {"tokens": 100, "tokens_per_s": 10.0, "stopped_at_limit": 0}
FIGURES = {"questions": 2, "repeats": 1, "baseline": SIDE, "eagle": {**SIDE, "tokens_per_s": 15.0}, "speedup": SPEEDUP,
           "acceptance": {"tau": 2.5, "by_position": [0.7, 0.5]}, "quality": {}}  # fmt: skip
SUMMARY = {
    "format": 1, "model_id": "head", "fingerprint": "0123456789ab", "settings": {"temperature": 0.0, "mode": "both"},
    "sets": {"quick": FIGURES}, "verdict": "x",
    "provenance": {"command": "fledge bench", "versions": {}, "hardware": {}, "config": {}, "time": "", "commit": None},
}  # fmt: skip
NO_FIGURE = (*NO_NUMBER, -1)

WRONG_SUMMARY: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("format",): (*NO_INT, 0, 2),
    ("model_id",): NO_TEXT,
    ("settings",): NO_OBJECT,
    ("sets",): (*NO_OBJECT, {"quick": 5}, {"quick": []}, {"quick": "x"}),
    ("sets", "quick", "baseline"): NO_OBJECT,
    ("sets", "quick", "eagle", "tokens_per_s"): NO_FIGURE,
    ("sets", "quick", "speedup"): NO_OBJECT,
    ("sets", "quick", "speedup", "value"): NO_FIGURE,
    ("sets", "quick", "speedup", "low"): NO_NUMBER,
    ("sets", "quick", "acceptance"): NO_OBJECT,
    ("sets", "quick", "acceptance", "tau"): NO_FIGURE,
}
WRONG_PROFILE: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("format",): (*NO_INT, 0, 2),
    ("profile",): NO_OBJECT,
    ("profile", "tree"): (*NO_OBJECT, {}),
    ("profile", "tree", "total_token"): (*NO_SIZE, 1),
    ("profile", "tree", "depth"): (*NO_INT, -1),
    ("profile", "tree", "top_k"): NO_SIZE,
    ("profile", "tau"): (*NO_FIGURE, 0),
    ("profile", "tokens_per_s"): NO_FIGURE,
    ("profile", "temperature"): NO_FIGURE,
    ("profile", "measured"): (*NO_OBJECT, {"plain": "x"}),
    ("profile", "curve"): (*NO_LIST, [5]),
    ("profile", "costs"): NO_OBJECT,
    ("profile", "hardware"): NO_OBJECT,
}
TREE = TreeShape(16, 3, 4)
COSTS = {"verify_s": {"1": 0.01, "16": 0.02}, "draft_s": {"4x1": 0.001, "4x3": 0.002}, "overhead_s": 0.001}


@functools.cache
def good_profile() -> bytes:
    path = Path(tempfile.mkdtemp(prefix="fledge-fuzz-profile-")) / "tree_profile.json"
    curve = [{"total_token": 16, "tau": 2.5, "tokens_per_s": 20.0}]
    write_profile(path, TreeProfile(TREE, 2.5, 20.0, 10.0, 0.0, {"plain": 10.0}, curve, COSTS, provenance.hardware()))
    return path.read_bytes()


def profile(rule: str | None, content: bytes) -> Case:
    def act(folder: Path) -> None:
        (folder / "tree_profile.json").write_bytes(content)
        found = read_profile(folder / "tree_profile.json")
        if rule is None and dataclasses.astuple(found.tree) != dataclasses.astuple(TREE):
            raise WrongValue(f"{found.tree}")

    return Case(AREA, rule and f"tree profile: {rule}", act, shown=repr(content[:200]))


def summary(rule: str | None, content: bytes) -> Case:
    """Compared with a sound one, which reads the figures."""

    def act(folder: Path) -> None:
        for name, text in (("a", encoded(SUMMARY)), ("b", content)):
            (folder / name).mkdir()
            (folder / name / "summary.json").write_bytes(text)
        run_through("report", ["a", "b", "--output", "both.json"])
        rows = json.loads((folder / "both.json").read_text())["rows"]
        if rule is None and [row["tau"] for row in rows] != ["2.50", "2.50"]:
            raise WrongValue(f"{rows}")

    return Case(AREA, rule and f"summary: {rule}", act, shown=repr(content[:200]))


def rows(name: str, line: bytes) -> Case:
    """A torn or foreign line of results.jsonl is left out; the sound ones stay."""

    def act(folder: Path) -> None:
        path, settings = folder / "results.jsonl", {"a": 1}
        with open_results(path, settings) as results:
            results.append({"dataset": "quick", "question_id": "1", "question_sha": "x", "repeat": 0})
        with path.open("ab") as file:
            file.write(line)
        with open_results(path, settings) as results:
            if len(results) != 1:
                raise WrongValue(f"{len(results)} rows of one")
        raise OSError("left out")  # the line is gone, as it should be

    return Case(AREA, f"rows: {name}", act, shown=repr(line[:200]))


BAD_LINES = {
    "cut": b'{"dataset": "quick", "quest', "a list": b"[1]\n", "null": b"null\n", "not UTF-8": b'{"dataset": "\xff"}\n',
    "NUL bytes": b"\0" * 50 + b"\n", "nested without end": b"[" * 100_000 + b"\n",
    "nested too deeply": b'{"dataset": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "a number of 5000 digits": b'{"dataset": "quick", "repeat": ' + b"9" * 5000 + b"}\n",
    "without a data set": b'{"question_id": "2"}\n',
    "a lone surrogate": b'{"dataset": "\\ud800"}\n',
    "a fingerprint that is a path": b'{"dataset": "quick", "fingerprint": "/../../x"}\n',
    "a fingerprint that is a list": b'{"dataset": "quick", "fingerprint": [1]}\n',
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One of these files, right or wrong in one place."""
    kind = draw(st.sampled_from(["profile", "summary", "rows"]))
    if kind == "rows":
        name = draw(st.sampled_from(list(BAD_LINES)))
        return rows(name, BAD_LINES[name])
    make = profile if kind == "profile" else summary
    good = json.loads(good_profile()) if kind == "profile" else SUMMARY
    wrong = WRONG_PROFILE if kind == "profile" else WRONG_SUMMARY
    change = draw(st.sampled_from(["valid", "field", "field", "text"]))
    if change == "valid":
        return make(None, encoded({**good, "note": draw(st.text(max_size=5))}))
    if change == "text":
        return make(*draw(broken_text(encoded(good))))
    required = [path for path in wrong if path in {("format",), ("profile",), ("profile", "tree"), ("sets",)}]
    rule, document = draw(broken_fields(good, wrong, required))
    return make(rule, encoded(document))
