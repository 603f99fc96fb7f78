"""Question files of a benchmark: a bad line is an error that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fledge.bench.prompts import load_questions
from fuzz.documents import DEEP
from fuzz.harness import Case, WrongValue
from fuzz.rows import TEXT

AREA = "question files"
Row = dict[str, Any]


def with_fields(**changes: Any) -> Callable[[Row], Row]:
    return lambda row: {**row, **changes}


def without(name: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key != name}


BAD_ROWS: dict[str, Callable[[Row], Any]] = {
    "a list": lambda row: [row],
    "a string": lambda row: "text",
    "null": lambda row: None,
    "turns missing": without("turns"),
    "turns empty": with_fields(turns=[]),
    "turns are null": with_fields(turns=None),
    "turns are a number": with_fields(turns=5),
    "turns are an object": with_fields(turns={"a": "b"}),
    "turns are true": with_fields(turns=True),
    "a turn is empty": with_fields(turns=[""]),
    "a turn is blank": with_fields(turns=["x", " \n"]),
    "a turn is a number": with_fields(turns=[5]),
    "a turn is null": with_fields(turns=["x", None]),
    "a turn is an object": with_fields(turns=[{"text": "x"}]),
    "a turn is a list of numbers": with_fields(turns=[[5]]),
    "a turn with a lone surrogate": with_fields(turns=["a\ud800"]),
    "a part without a type": with_fields(turns=[[{"text": "x"}]]),
    "a part of an unknown type": with_fields(turns=[[{"type": "smell", "text": "x"}]]),
    "text of a part is a number": with_fields(turns=[[{"type": "text", "text": 5}]]),
    "a picture that is a number": with_fields(turns=[[{"type": "image", "image": 5}]]),
    "question id is a list": with_fields(question_id=[1]),
    "question id is an object": with_fields(question_id={}),
    "question id is null": with_fields(question_id=None),
    "question id is used before": with_fields(question_id="0"),
    "question id with a lone surrogate": with_fields(question_id="\udfff"),
    "category is an object": with_fields(category={"a": 1}),
    "category is a list": with_fields(category=["x"]),
    "reference is a number": with_fields(reference=5),
    "reference is an object": with_fields(reference={"a": "b"}),
    "reference holds lists": with_fields(reference=[["x"]]),
    "system is a number": with_fields(system=5),
    "system is a list": with_fields(system=["x"]),
    "code check is a list": with_fields(code_check=["x"]),
    "code check is text": with_fields(code_check="assert True"),
    "code check without its test": with_fields(code_check={"prompt": "x", "entry_point": "f"}),
    "code check of numbers": with_fields(code_check={"prompt": 1, "test": 2, "entry_point": 3}),
    "prompt is a number": lambda row: {"question_id": row["question_id"], "prompt": 5},
    "messages are text": lambda row: {"question_id": row["question_id"], "messages": "text"},
    "messages are a number": lambda row: {"question_id": row["question_id"], "messages": 5},
    "a message is text": lambda row: {"question_id": row["question_id"], "messages": [
        {"role": "user", "content": "x"}, "text"]},
    "a message's role is a list": lambda row: {"question_id": row["question_id"], "messages": [
        {"role": ["user"], "content": "x"}]},
    "a message's content is a number": lambda row: {"question_id": row["question_id"], "messages": [
        {"role": "user", "content": 5}]},
}  # fmt: skip

BAD_LINES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda line: line[: len(line) // 2],
    "text behind it": lambda line: line + b" x",
    "two objects": lambda line: line + line,
    "not UTF-8": lambda line: line.replace(b'"', b'"\xff', 1),
    "NUL bytes": lambda line: b"\0" * len(line),
    "nested without end": lambda line: b"[" * DEEP,
    "nested too deeply": lambda line: line[:-1] + b', "x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a number of 5000 digits": lambda line: line[:-1] + b', "x": ' + b"9" * 5000 + b"}",
}


@st.composite
def good_row(draw: st.DrawFn, number: int) -> Row:
    row = {"question_id": str(number), "category": draw(TEXT), "turns": draw(st.lists(TEXT, min_size=1, max_size=3))}
    optional = {"reference": draw(st.lists(TEXT, max_size=2)), "system": draw(TEXT)}
    return row | {key: value for key, value in optional.items() if draw(st.booleans())}


def case(rule: str | None, content: bytes, expected: list[Row]) -> Case:
    def act(folder: Path) -> None:
        path = folder / "questions.jsonl"
        path.write_bytes(content)
        found = load_questions(str(path))
        said = [(question.id, list(question.turns), question.system) for question in found]
        wanted = [(row["question_id"], row["turns"], row.get("system")) for row in expected]
        if said != wanted:
            raise WrongValue(f"{said!r}, not {wanted!r}")

    return Case(AREA, rule, act, shown=repr(content[-200:]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two good questions, and a third that is good or broken."""
    rows = [draw(good_row(number)) for number in range(3)]
    lines = [json.dumps(row).encode() for row in rows]
    kind = draw(st.sampled_from(["valid", "row", "row", "row", "line", "file"]))
    if kind == "valid":
        ends = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
        mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
        return case(None, mark + ends.join(lines) + draw(st.sampled_from([b"", b"\n"])), rows)
    if kind == "row":
        name = draw(st.sampled_from(list(BAD_ROWS)))
        return case(f"row: {name}", b"\n".join([*lines[:2], json.dumps(BAD_ROWS[name](rows[2])).encode()]), rows)
    if kind == "line":
        name = draw(st.sampled_from(list(BAD_LINES)))
        return case(f"line: {name}", b"\n".join([*lines[:2], BAD_LINES[name](lines[2])]), rows)
    name = draw(st.sampled_from(["empty file", "only blanks", "not there"]))
    if name == "not there":
        return Case(AREA, "file: not there", lambda folder: load_questions(str(folder / "absent.jsonl")))
    return case(f"file: {name}", b"" if name == "empty file" else b"\n \n", rows)
