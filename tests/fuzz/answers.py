"""The output folder of `fledge regenerate`, as a continued run and as a training run find it."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fledge.data.dataset import TokenizedData
from fledge.data.rejects import Reject
from fledge.regeneration.journal import Journal
from fuzz.documents import NO_COUNT, NO_INT, NO_OBJECT, NO_TEXT, broken_fields, broken_text
from fuzz.harness import Case, WrongValue
from fuzz.states import template

AREA = "answers and journals"
TOTAL, SHARD = 7, 3  # two sealed shards, and one of a row that is under way
SETTINGS = {"model": "target", "seed": 1}
SHARDS = ("shard-00000.jsonl", "shard-00001.jsonl")
SEALED, PARTIAL, MANIFEST = ".journal/00000.sealed", ".journal/00002.partial", "manifest.json"

WRONG_SEALED: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("file",): (*NO_TEXT, "", "absent", "../x", "/etc/passwd", "a\0b", SHARDS[1]),
    ("bytes",): (*NO_COUNT, 5),
    ("sha256",): (*NO_TEXT, "", "0" * 64),
    ("rows",): (*NO_COUNT, 2, 99),
    ("input_rows",): (*NO_COUNT, 2, 99),
    ("first_row",): (*NO_COUNT, 1),
    ("counts",): NO_OBJECT,
    ("counts", "rows"): (*NO_INT, -1),
    ("rejects",): (*NO_OBJECT, {"x": {}}, {"0": 5}, {"99": {"id": "a", "where": "", "reason": "r", "detail": ""}}),
}
WRONG_MANIFEST: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("format",): (*NO_INT, 0, 99),
    ("settings",): (*NO_OBJECT, {}),
    ("settings", "seed"): (2, "1", None),
    ("settings", "input_rows"): (*NO_INT, 8),
}


def row(index: int) -> dict[str, Any]:
    return {"id": f"row-{index}", "conversations": [
        {"from": "human", "value": f"question {index}"}, {"from": "gpt", "value": f"answer {index}"}]}  # fmt: skip


@functools.cache
def good_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fledge-fuzz-answers-")) / "answers"
    with journal(folder) as writing:
        for index in range(TOTAL):
            if index == 4:
                writing.reject(index, "row-4", "empty answer", "nothing", "data.jsonl:5")
            elif index < 6:
                writing.add(index, row(index))
        writing.add(6, row(6))
    return folder


@functools.cache
def unfinished() -> Path:
    """The same with the last shard under way: one row of two."""
    folder = Path(tempfile.mkdtemp(prefix="fledge-fuzz-answers-")) / "answers"
    with journal(folder, total=TOTAL + 1) as writing:
        for index in range(TOTAL):
            writing.add(index, row(index))
    return folder


def journal(folder: Path, total: int = TOTAL) -> Journal:
    return Journal(folder, total=total, shard_size=SHARD, settings=SETTINGS)


def continued(folder: Path, total: int) -> list[int]:
    """Rows that a continued run takes as done."""
    with journal(folder, total) as run:
        list(run.rejects())
        run.counts()
        return [index for index in range(total) if run.is_done(index)]


def trained(folder: Path) -> dict[str, str]:
    """Answers by id, as training reads the folder."""
    data = TokenizedData.from_path(str(folder), template(), cache_dir=None, max_reject_share=0.0)
    return {
        sample.id: data.template.tokenizer.decode(sample.input_ids[sample.loss_mask], skip_special_tokens=True)
        for sample in data
    }


def case(rule: str | None, reader: str, change: Callable[[Path], Any], source: Callable[[], Path]) -> Case:
    total = TOTAL + (source is unfinished)

    def act(folder: Path) -> None:
        copy = shutil.copytree(source(), folder / "answers")
        change(copy)
        if reader == "continue":
            done = continued(copy, total)
            torn = rule is not None and PARTIAL in rule  # a damaged line is asked again, the rest is kept
            if torn and done == list(range(6)):
                raise Reject("cut", "the row is asked again")
            if done != list(range(TOTAL)):
                raise WrongValue(f"done are {done}")
        elif (said := trained(copy)) != (wanted := {f"row-{i}": f"answer {i}" for i in range(TOTAL) if i != 4}):
            raise WrongValue(f"{said} instead of {wanted}")

    return Case(AREA, rule and f"{rule}, {reader}", act, shown=f"{rule}, {reader}")


def turned(name: str, place: float, bit: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << bit
        (folder / name).write_bytes(content)

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "not there": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a line twice": lambda path: path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(True)[0]),
    "another line": lambda path: path.write_bytes(path.read_bytes().replace(b"answer", b"ANSWER")),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A folder as a run left it, or with one thing changed."""
    template()
    kind = draw(st.sampled_from(["valid", "shard", "shard", "partial", "sealed", "sealed", "manifest", "text"]))
    reader = draw(st.sampled_from(["continue", "train"]))
    if kind == "valid":
        name = draw(st.sampled_from([f"{letter}.txt" for letter in "abcdef"]))
        return case(None, reader, lambda folder: (folder / name).write_text("mine"), good_folder)
    if kind == "shard":
        name, rule = draw(st.sampled_from(SHARDS)), draw(st.sampled_from([*DAMAGE, "a bit turned"]))
        if rule == "a bit turned":
            return case(f"{name}: {rule}", reader, turned(name, draw(st.floats(0, 1)), draw(st.integers(0, 7))),
                        good_folder)  # fmt: skip
        return case(f"{name}: {rule}", reader, lambda folder: DAMAGE[rule](folder / name), good_folder)
    if kind == "partial":
        rule = draw(st.sampled_from(["cut", "a byte short", "another line", "zeros", "a bit turned", "a folder"]))
        change = turned(PARTIAL, draw(st.floats(0, 1)), draw(st.integers(0, 7))) if rule == "a bit turned" else (
            lambda folder: DAMAGE[rule](folder / PARTIAL))  # fmt: skip
        return case(f"{PARTIAL}: {rule}", "continue", change, unfinished)
    name = SEALED if kind == "sealed" else MANIFEST
    text = (good_folder() / name).read_bytes()
    if kind == "text":
        name = draw(st.sampled_from([SEALED, MANIFEST]))
        rule, content = draw(broken_text((good_folder() / name).read_bytes()))
        return case(f"{name}: {rule}", "continue", lambda folder: (folder / name).write_bytes(content), good_folder)
    wrong = WRONG_SEALED if kind == "sealed" else WRONG_MANIFEST
    rule, document = draw(broken_fields(json.loads(text), wrong, [path for path in wrong if len(path) == 1]))
    return case(f"{name}: {rule}", "continue", lambda folder: (folder / name).write_text(json.dumps(document)),
                good_folder)  # fmt: skip
